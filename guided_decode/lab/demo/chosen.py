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


_SENTIMENT = GuidanceConfig(beta=10.0, top_k=8, top_p=0.95)
SMOL = {
    name: Settings(own, replace(own, gate=0.9), replace(own, rule="prune", margin=0.1), own)
    for name, own in {"sentiment": _SENTIMENT, "constraints": _SENTIMENT}.items()
}
