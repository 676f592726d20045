"""The decoding methods that a demo compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.demo import chosen

SAMPLES = 8
FEWER_SAMPLES = (2, 4)

# Who guides, or picks the best of n: the critic, a head on the policy's own hidden states, or the
# task's judge, whom nobody has while decoding.
By = Literal["critic", "trunk", "judge"]


@dataclass(frozen=True, slots=True)
class Method:
    """One way of decoding.

    name: in the table. curve: which line of the plot it is a point of, if any; label: its text
    there.
    sample: at temperature 1; else greedy. config: of guidance. best_of: samples a prompt, of
    which `by`'s favourite is the answer. shown: whether it has a row in the table.
    """

    name: str
    curve: str
    label: str = ""
    sample: bool = True
    config: GuidanceConfig | None = None
    best_of: int = 1
    by: By = "critic"
    shown: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What a demo runs.

    methods: in the order of the table. others: more points of the plot's lines; those of best of n
    are the first of the samples that are there already.
    """

    methods: tuple[Method, ...]
    others: tuple[Method, ...]

    @property
    def every(self) -> tuple[Method, ...]:
        return self.methods + self.others

    @property
    def best_of(self) -> list[Method]:
        """Those that pick one of several samples, of one draw."""
        return [method for method in self.every if method.best_of > 1]

    @property
    def runs(self) -> int:
        """How often every prompt is decoded."""
        return len(self.every) - len(self.best_of) + bool(self.best_of)


def best_of(n: int, by: By = "critic") -> Method:
    """The best of n samples by the critic, or by the judge."""
    curve = "best of n" if by == "critic" else "best of n, judge"
    return Method(
        f"best of {n} by {by}", curve, label=f"n={n}", best_of=n, by=by, shown=n == SAMPLES
    )


def reweight(config: GuidanceConfig, top_k: int | None = None) -> Method:
    """Guided sampling, or, for the plot alone, with another number of candidates a step."""
    own = config if top_k is None else replace(config, top_k=top_k)
    return Method("guided, reweight", "reweight", f"k={own.top_k}", config=own,
                  shown=top_k is None)  # fmt: skip


SUMS = Plan(
    (
        Method("plain, greedy", "greedy", sample=False),
        Method("plain, sampled", "best of n", "n=1"),
        best_of(SAMPLES),
        Method("guided, greedy", "", sample=False, config=chosen.REWEIGHT),
        reweight(chosen.REWEIGHT),
        Method("guided, reweight, gated", "gated", config=chosen.GATED),
        Method("guided, prune", "prune", config=chosen.PRUNE),
    ),
    (*map(best_of, FEWER_SAMPLES), *(reweight(chosen.REWEIGHT, k) for k in (2, 8))),
)
METHODS = SUMS.methods


def smol_plan(settings: chosen.Settings) -> Plan:
    """The same with the true judge and the policy's own trunk beside the critic."""
    own = settings.reweight
    ranked: Sequence[By] = ("critic", "judge")
    return Plan(
        (
            Method("plain, greedy", "greedy", sample=False),
            Method("plain, sampled", "best of n", "n=1"),
            *(best_of(SAMPLES, by) for by in ranked),
            Method("guided, greedy", "", sample=False, config=own),
            reweight(own),
            Method("guided, reweight, gated", "gated", config=settings.gated),
            Method("guided, prune", "prune", config=settings.prune),
            Method("guided by the trunk", "trunk", config=settings.trunk, by="trunk"),
        ),
        tuple(best_of(n, by) for by in ranked for n in FEWER_SAMPLES),
    )
