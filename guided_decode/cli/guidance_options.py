"""The options of guidance, and the rule that they make."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer

from guided_decode.cli.checkpoints import DEFAULT_SCORER
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.presets import PRESETS, find_preset
from guided_decode.lab.demo import chosen

_PANEL = "Guidance"


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=_PANEL)


Preset = Annotated[
    str | None,
    _option("a published method's settings, which the options below change",
            metavar="|".join(PRESETS)),
]  # fmt: skip
Beta = Annotated[float | None, _option("weight of the advantage, in logits per unit of value")]
TopK = Annotated[
    int | None, _option("candidates a step; 0 is the whole vocabulary (implicit rewards only)")
]
TopP = Annotated[float | None, _option("cut the candidates at this probability mass")]
Rule = Annotated[
    str | None,
    _option("add beta times the advantage, or drop candidates", metavar="reweight|prune"),
]
Margin = Annotated[
    float | None, _option("prune: drop what is further below the best, in units of value")
]
Tail = Annotated[str | None, _option("tokens outside the candidates", metavar="mask|keep")]
Gate = Annotated[
    float | None, _option("leave steps alone whose top token has at least this probability")
]

Baseline = Annotated[str | None, _option("what is subtracted from Q", metavar="prefix|mean")]
KlCoef = Annotated[float | None, _option("weight of the KL term; needs --reference")]
ValueGate = Annotated[
    float | None, _option("score candidates only where the prefix's value is below this")
]
ValueGateFall = Annotated[
    float | None,
    _option("score candidates only where the value fell by more than this since the last token"),
]
Abstain = Annotated[
    float | None, _option("end an answer whose value falls below this (calibrate --abstain)")
]
AbstainAfter = Annotated[int | None, _option("tokens that an answer has before that \\[1]")]


@dataclass(frozen=True, slots=True)
class CalibratedOptions:
    """A preset, and the fields of GuidanceConfig that `calibrate` is told; None was not given."""

    preset: Preset = None
    beta: Beta = None
    top_k: TopK = None
    top_p: TopP = None
    rule: Rule = None
    tail: Tail = None
    gate: Gate = None
    baseline: Baseline = None
    kl_coef: KlCoef = None
    value_gate: ValueGate = None
    value_gate_fall: ValueGateFall = None

    def over(self, default: GuidanceConfig) -> GuidanceConfig:
        """The preset, else the default, with what was given in its place.

        Raises ValueError: there is no such preset; as GuidanceConfig.
        """
        given = asdict(self)
        name = given.pop("preset")
        return guidance_config(default if name is None else find_preset(name).config, **given)

    def reading(self, scorer: ScorerOptions) -> ScorerOptions:
        """How the scorer is read: by the preset's transform, where none was given."""
        transform = None if self.preset is None else find_preset(self.preset).transform
        return replace(scorer, transform=scorer.transform or transform)


@dataclass(frozen=True, slots=True)
class GuidanceOptions(CalibratedOptions):
    """A preset, and the fields of GuidanceConfig; None was not given."""

    margin: Margin = None
    abstain: Abstain = None
    abstain_after: AbstainAfter = None


def guidance_config(default: GuidanceConfig, **given: Any) -> GuidanceConfig:
    """The default with what was given in its place; None was not given.

    Raises ValueError as GuidanceConfig does.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    if fields.get("top_k") == 0:
        fields["top_k"] = None
    return default.changed(**fields)


def chosen_for(scorer: str, rule: object) -> GuidanceConfig:
    """The rule's settings that were chosen for a scorer of that name, where some were."""
    if scorer != DEFAULT_SCORER:
        return GuidanceConfig()
    return chosen.PRUNE if rule == "prune" else chosen.REWEIGHT
