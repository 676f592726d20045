"""What was chosen on tiny-tulu's validation prompts; the held-out ones were not looked at."""

from dataclasses import replace

from guided_decode.guidance.config import GuidanceConfig

REWEIGHT = GuidanceConfig(beta=10.0, top_k=4)
# Where the policy is sure, the critic is not asked.
GATED = replace(REWEIGHT, gate=0.9)
# top_p keeps out tokens that the policy would never draw: the critic saw none of them in training,
# and pruning, unlike reweighting, does not hold their low probability against its word.
PRUNE = GuidanceConfig(rule="prune", margin=0.02, top_k=4, top_p=0.9)
