"""The options of guidance, and the rule that they make."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from guided_decode.guidance.config import GuidanceConfig

_PANEL = "Guidance"


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=_PANEL)


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


@dataclass(frozen=True, slots=True)
class GuidanceOptions:
    """The fields of GuidanceConfig; None was not given."""

    beta: Beta = None
    top_k: TopK = None
    top_p: TopP = None
    rule: Rule = None
    margin: Margin = None
    tail: Tail = None
    gate: Gate = None
    baseline: Baseline = None
    kl_coef: KlCoef = None

    def over(self, default: GuidanceConfig) -> GuidanceConfig:
        """The default with what was given in its place. Raises ValueError as GuidanceConfig."""
        return guidance_config(default, **asdict(self))


def guidance_config(default: GuidanceConfig, **given: Any) -> GuidanceConfig:
    """The default with what was given in its place; None was not given.

    Raises ValueError as GuidanceConfig does.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    if fields.get("top_k") == 0:
        fields["top_k"] = None
    return default.changed(**fields)
