"""The guidance rule's settings: one frozen record, validated once, passed on whole."""

import math
import operator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

Rule = Literal["reweight", "prune"]
Tail = Literal["mask", "keep"]
Baseline = Literal["prefix", "mean"]
# What a scorer that fails does: end the call, or leave its rows unguided.
OnError = Literal["raise", "passthrough"]

_NUMBERS = (
    "beta", "top_k", "top_p", "margin", "gate", "kl_coef", "value_gate", "value_gate_fall",
    "abstain", "abstain_after",
)  # fmt: skip
_FLOAT32_MAX = 3.4028234e38
_INT64_MAX = 2**63 - 1


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
    value_gate, value_gate_fall: guidance works only in steps where the value says that something
        is going wrong; in units of value. With s_t the prompt and t tokens of the response:

            open(t) = V(s_t) < value_gate  or  V(s_t-1) - V(s_t) > value_gate_fall

        A bound that is None opens nothing, and nothing has fallen before the first token; both
        None is open always. In other steps no candidate is scored: A = 0 for all of them, and the
        tail rule still applies, as under `gate`, which is asked first.
    abstain, abstain_after: a row is ended at the first t >= abstain_after (None is 1) with
        V(s_t) < abstain, after its t tokens; None ends nobody. Nothing else of guidance is needed
        for it: with beta 0 and tail "keep" a row only abstains, and its prefix alone is scored.

    numpy's numbers are numbers, and are kept as Python's. Raises ValueError where a field, or a
    combination of fields, has no meaning.
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
    value_gate: float | None = None
    value_gate_fall: float | None = None
    abstain: float | None = None
    abstain_after: int | None = None

    def __post_init__(self) -> None:
        _check_choice("rule", self.rule, ("reweight", "prune"))
        _check_choice("tail", self.tail, ("mask", "keep"))
        _check_choice("baseline", self.baseline, ("prefix", "mean"))
        _check_number("beta", self.beta)
        _check_number("top_p", self.top_p, above=0.0, most=1.0)
        _check_number("kl_coef", self.kl_coef, least=0.0)
        if self.gate is not None:
            _check_number("gate", self.gate, above=0.0, most=1.0)
        if self.top_k is not None:
            _check_count("top_k", self.top_k)
        self._check_margin()
        self._check_values()
        for name in _NUMBERS:
            object.__setattr__(self, name, _plain(getattr(self, name)))

    def _check_values(self) -> None:
        if self.value_gate is not None:
            _check_number("value_gate", self.value_gate)
        if self.value_gate_fall is not None:
            _check_number("value_gate_fall", self.value_gate_fall, least=0.0)
        if self.abstain is not None:
            _check_number("abstain", self.abstain)
        if self.abstain_after is not None:
            _check_count("abstain_after", self.abstain_after)
            if self.abstain is None:
                raise ValueError(
                    f"abstain_after={_shown(self.abstain_after)} was given without abstain: pass "
                    "abstain=, the value below which a row is ended, or drop it"
                )

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
                f'margin={_shown(self.margin)} was given with rule="reweight", which has no '
                'margin: drop it, or pass rule="prune"'
            )

    def changed(self, **settings: Any) -> "GuidanceConfig":
        """The same with some fields changed; a margin is not taken over to the other rule."""
        if settings.get("rule", self.rule) != self.rule:
            settings.setdefault("margin", None)
        if settings.get("abstain", self.abstain) is None:
            settings.setdefault("abstain_after", None)
        return replace(self, **settings) if settings else self

    @property
    def needs_scores(self) -> bool:
        """Whether any advantage can change a logit: beta = 0 under "reweight" scores nothing."""
        return self.rule == "prune" or self.beta != 0.0

    @property
    def guides(self) -> bool:
        """Whether guidance may change a logit at all."""
        return self.needs_scores or self.tail != "keep"

    @property
    def has_value_gate(self) -> bool:
        """Whether V(prefix) decides in which steps candidates are scored."""
        bounds = (self.value_gate, self.value_gate_fall)
        return self.needs_scores and bounds != (None, None)

    def is_open(self, value: float, before: float) -> bool:
        """Whether the value gate lets guidance work; value: V(s_t), before: V(s_t-1), or NaN."""
        low = self.value_gate is not None and value < self.value_gate
        fallen = self.value_gate_fall is not None and before - value > self.value_gate_fall
        return low or fallen or not self.has_value_gate

    def ends(self, value: float, tokens: int) -> bool:
        """Whether a row is ended whose response has so many tokens, and whose V is `value`."""
        return self.abstains_at(tokens) and value < self.abstain  # type: ignore[operator]

    def abstains_at(self, tokens: int) -> bool:
        """Whether the value of a response of so many tokens may end it."""
        return self.abstain is not None and tokens >= (self.abstain_after or 1)


def _check_choice(name: str, given: object, choices: tuple[str, ...]) -> None:
    if not isinstance(given, str) or given not in choices:
        raise ValueError(f"{name}={_shown(given)}: expected one of {', '.join(map(repr, choices))}")


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
    number = _as_float(given)
    fits = (
        abs(number) <= _FLOAT32_MAX
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
    )
    if not fits:
        raise ValueError(f"{name}={_shown(given)}: expected {wanted}")


def _as_float(given: object) -> float:
    """The number that was given; NaN where it is none, or too large for a float."""
    if not isinstance(given, Real) or isinstance(given, bool):
        return math.nan
    try:
        return float(given)
    except OverflowError:
        return math.nan


def _check_count(name: str, given: object) -> None:
    is_integer = isinstance(given, Integral) and not isinstance(given, bool)
    if not is_integer or not 1 <= operator.index(given) <= _INT64_MAX:  # type: ignore[arg-type]
        raise ValueError(f"{name}={_shown(given)}: expected an integer of at least 1, or None")


def _plain(given: Any) -> Any:
    """numpy's numbers as Python's, which other libraries and JSON take too."""
    if given is None or type(given) in (int, float):
        return given
    return int(given) if isinstance(given, Integral) else float(given)


def _shown(given: object) -> str:
    """A setting as an error shows it, however long it is."""
    if isinstance(given, int) and not isinstance(given, bool) and given.bit_length() > 200:
        return f"an integer of {given.bit_length()} bits"
    text = repr(given)
    return text if len(text) <= 100 else f"{text[:100]}…"
