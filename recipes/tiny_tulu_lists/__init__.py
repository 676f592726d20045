"""How tiny-tulu's second family is made: a policy of lists, and what TRL makes of preferences."""
