"""Published token-level methods as settings of the guidance rule.

Each is `GuidanceConfig` with the figures that its paper or code states, and equals the method's own
formula over the candidates (`tests/guidance/test_presets.py` holds it to that). V is the scorer's
value of the prefix with the candidate; ends are scored like any token where the scorer's terminal
rule is "critic".

GenARM (log π + α·log π_ARM, arXiv 2410.08193) is none of them: an implicit reward subtracts its
reference, which an autoregressive reward model has not. With the policy itself as the reference,
beta = α / (1 + α) at temperature T / (1 + α) is the distribution of GenARM at temperature T.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from guided_decode.guidance.config import GuidanceConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """A published method. formula: what it does to a token's logit l. paper: where it is from.

    transform: of the scorer's head, as `load_scorer` takes it; None: the family's.
    """

    name: str
    formula: str
    paper: str
    config: GuidanceConfig
    transform: str | None = None


PRESETS = MappingProxyType({
    each.name: each
    for each in (
        # π·exp(λV), λ = beta: V(s) is the same for all candidates, so the advantage is as good. The
        # paper weighs the whole vocabulary: top_k of its size does, the default cuts it.
        Preset("cd", "l + λ·V", "controlled decoding, tokenwise (2310.17022)",
               GuidanceConfig(beta=1.0, tail="mask", baseline="prefix")),
        # p·p(class | prefix·a)^λ over the 200 likeliest: the value is a log-probability, λ = beta.
        Preset("fudge", "l + λ·log p(class)", "FUDGE (2104.05218)",
               GuidanceConfig(beta=1.0, top_k=200, tail="mask"), "log-sigmoid"),
        # The mean of V over the candidates is subtracted, and the other tokens stay as they are.
        Preset("vas", "l + β·(V − mean V)", "value augmented sampling (2405.06639)",
               GuidanceConfig(beta=3.0, top_k=20, tail="keep", baseline="mean")),
        # Decoded greedily or by sampling; w = beta.
        Preset("args", "l + w·r", "ARGS (2402.01694)",
               GuidanceConfig(beta=1.0, top_k=10, tail="mask")),
        Preset("rad", "l + β·clip(r, 0, 1)", "RAD (2310.09520)",
               GuidanceConfig(beta=30.0, top_k=20, tail="mask"), "clip:0,1"),
        # The whole vocabulary, which an implicit reward reads from one forward; α = beta.
        Preset("proxy-tuning", "l + α·(log π* − log π_ref)", "proxy-tuning (2401.08565)",
               GuidanceConfig(beta=1.0, top_k=None, tail="mask")),
    )
})  # fmt: skip


def find_preset(name: str) -> Preset:
    """The preset of a name. Raises ValueError: there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"preset={name}: unknown{hint}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset(name: str, **settings: Any) -> GuidanceConfig:
    """A published method's settings, with some changed: `preset("vas", beta=2.0)`.

    Raises ValueError: there is no such preset; as `GuidanceConfig`.
    """
    return find_preset(name).config.changed(**settings)
