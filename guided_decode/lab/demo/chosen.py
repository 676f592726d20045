"""What was chosen on validation prompts; the held-out ones were not looked at."""

from dataclasses import dataclass, replace

from guided_decode.guidance.config import GuidanceConfig

# On tiny-tulu.
REWEIGHT = GuidanceConfig(beta=10.0, top_k=4)
# Where the policy is sure, the critic is not asked.
GATED = replace(REWEIGHT, gate=0.9)
# top_p keeps out tokens that the policy would never draw: the critic saw none of them in training,
# and pruning, unlike reweighting, does not hold their low probability against its word.
PRUNE = GuidanceConfig(rule="prune", margin=0.02, top_k=4, top_p=0.9)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one task of smol: reweighting, with a gate, pruning, and by the policy's own trunk."""

    reweight: GuidanceConfig
    gated: GuidanceConfig
    prune: GuidanceConfig
    trunk: GuidanceConfig


# Eight candidates of the likeliest 95%: a small model's tail at temperature 1 is gibberish.
_SMOL = GuidanceConfig(beta=10.0, top_k=8, top_p=0.95)
# On 100 validation prompts beta 4, 10 and 20 earn +0.39, +0.60 and +0.72 on sentiment, and 0.60,
# 0.57 and 0.56 on constraints. Gate, margin, and those of the trunk's head were not tried.
_BETAS = {"sentiment": 20.0, "constraints": 4.0}
SMOL = {
    name: Settings(own, replace(own, gate=0.9), replace(own, rule="prune", margin=0.1), own)
    for name, own in ((name, replace(_SMOL, beta=beta)) for name, beta in _BETAS.items())
}
