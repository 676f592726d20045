"""The beta that yields a target divergence from the policy, for one policy and one scorer."""
