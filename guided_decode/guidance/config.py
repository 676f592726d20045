"""The guidance rule's settings: one frozen record, validated once, passed on whole."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Rule = Literal["reweight", "prune"]
Tail = Literal["mask", "keep"]
Baseline = Literal["prefix", "mean"]
# What a scorer that fails does: end the call, or leave its rows unguided.
OnError = Literal["raise", "passthrough"]

_FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True, slots=True)
class GuidanceConfig:
    """How advantages change the next-token distribution.

    beta: weight of the advantage under "reweight", in logits per unit of value.
    top_k: how many of the policy's largest logits are candidates; None, the whole vocabulary, is
        for scorers that read every candidate from one forward (implicit reward).
    top_p: of these, the smallest set of largest ones that reaches this probability mass.
    rule: "reweight" adds beta times the advantage; "prune" drops candidates whose advantage is
        more than `margin` below the best one's.
    margin: in units of value; needed by "prune", which has no default for it.
    tail: tokens outside the candidates are masked ("mask") or left alone ("keep").
    baseline: what is subtracted from Q: V(prefix) ("prefix"), or the candidates' mean ("mean", the
        rule of Value Augmented Sampling).
    gate: rows whose top token has at least this probability are not scored; None scores every row.
    kl_coef: weight of log pi - log pi_ref that is subtracted from the advantage.

    Raises ValueError where a field, or a combination of fields, has no meaning.
    """

    beta: float = 1.0
    top_k: int | None = 16
    top_p: float = 1.0
    rule: Rule = "reweight"
    margin: float | None = None
    tail: Tail = "mask"
    baseline: Baseline = "prefix"
    gate: float | None = None
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("rule", self.rule, ("reweight", "prune"))
        _check_choice("tail", self.tail, ("mask", "keep"))
        _check_choice("baseline", self.baseline, ("prefix", "mean"))
        _check_number("beta", self.beta)
        _check_number("top_p", self.top_p, above=0.0, most=1.0)
        _check_number("kl_coef", self.kl_coef, least=0.0)
        if self.gate is not None:
            _check_number("gate", self.gate, above=0.0, most=1.0)
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k={self.top_k!r}: expected an integer of at least 1, or None")
        self._check_margin()

    def _check_margin(self) -> None:
        if self.rule == "prune":
            if self.margin is None:
                raise ValueError(
                    'rule="prune" was given without a margin: pass margin=, in units of the '
                    "critic's value (it has no default because those units differ by critic)"
                )
            _check_number("margin", self.margin, least=0.0)
        elif self.margin is not None:
            raise ValueError(
                f'margin={self.margin!r} was given with rule="reweight", which has no margin: '
                'drop it, or pass rule="prune"'
            )

    def changed(self, **settings: Any) -> "GuidanceConfig":
        """The same with some fields changed; a margin is not taken over to the other rule."""
        if settings.get("rule", self.rule) != self.rule:
            settings.setdefault("margin", None)
        return replace(self, **settings) if settings else self

    @property
    def needs_scores(self) -> bool:
        """Whether any advantage can change a logit: beta = 0 under "reweight" scores nothing."""
        return self.rule == "prune" or self.beta != 0.0


def _check_choice(name: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name}={given!r}: expected one of {', '.join(map(repr, choices))}")


def _check_number(
    name: str,
    given: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    bounds = [f"at least {least:g}" if least is not None else ""]
    bounds += [f"above {above:g}" if above is not None else ""]
    bounds += [f"at most {most:g}" if most is not None else ""]
    wanted = " and ".join(["a finite number (float32)", *filter(None, bounds)])
    fits = (
        isinstance(given, int | float)
        and not isinstance(given, bool)
        and math.isfinite(given)
        and abs(given) <= _FLOAT32_MAX
        and (least is None or given >= least)
        and (above is None or given > above)
        and (most is None or given <= most)
    )
    if not fits:
        raise ValueError(f"{name}={given!r}: expected {wanted}")
