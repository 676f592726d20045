"""Timing in pairs: every way in turn within one round, and ratios round by round."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines import Copied, Models, Ours, Plain, Recomputed, Way
from guided_decode import GuidanceConfig

TOLERANCE = 1e-4
# A way's turn within a round: as many steps as fill this time, at most so many.
TURN_SECONDS, TURN_STEPS = 0.2, 4


class DisagreementError(RuntimeError):
    """Two ways to decode do not give the same guided logits."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    batch: int
    prefix: int
    k: int

    def __str__(self) -> str:
        return f"batch {self.batch}, prefix {self.prefix}, k {self.k}"


@dataclass(frozen=True)
class Ratio:
    """A ratio's median over the rounds, with its extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, numerators: list[float], denominators: list[float]) -> "Ratio":
        """Round by round; the shorter list names the rounds that have both."""
        ratios = [a / b for a, b in zip(numerators, denominators, strict=False)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Result:
    """Seconds a token of each way by round, and the largest difference of guided logits."""

    case: Case
    seconds: dict[str, list[float]]
    steps: dict[str, int]
    difference: float

    def milliseconds(self, way: str) -> float:
        return 1e3 * statistics.median(self.seconds[way])

    @property
    def over_plain(self) -> Ratio:
        return Ratio.of(self.seconds["ours"], self.seconds["plain"])

    def faster_than(self, way: str) -> Ratio:
        return Ratio.of(self.seconds[way], self.seconds["ours"])


def run_case(
    models: Models, case: Case, pairs: int, recompute_seconds: float, seed: int = 0
) -> Result:
    """Checks that the guided ways agree, then times all ways in rounds.

    Args:
        models: policy and critic.
        case: what to run.
        pairs: rounds.
        recompute_seconds: full recomputation joins only the first rounds, as many as this buys,
            at least three.
        seed: of the prompts.

    Raises DisagreementError where the ways do not give the same guided logits.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = models.policy.config.vocab_size
    prompts = torch.randint(3, vocab, (case.batch, case.prefix), generator=generator)
    config = GuidanceConfig(beta=1.0, top_k=case.k)
    ways: dict[str, Way] = {
        "plain": Plain(models, prompts),
        "ours": Ours(models, prompts, config),
        "copied": Copied(models, prompts, config),
        "recomputed": Recomputed(models, prompts, config),
    }
    difference = check_equal(case, {name: ways[name] for name in ("ours", "copied", "recomputed")})
    once = {name: way.seconds(1) for name, way in ways.items()}
    steps = {name: max(1, min(TURN_STEPS, int(TURN_SECONDS / t))) for name, t in once.items()}
    rounds = dict.fromkeys(ways, pairs)
    rounds["recomputed"] = min(pairs, max(3, int(recompute_seconds / once["recomputed"])))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(pairs):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if turn < rounds[name]:
                seconds[name].append(ways[name].seconds(steps[name]))
    return Result(case, seconds, steps, difference)


def check_equal(case: Case, ways: Mapping[str, Way], steps: int = 2) -> float:
    """Compares the guided logits of all ways over a few steps; returns the largest difference."""
    largest = 0.0
    for step in range(steps):
        logits = {name: way.next_logits() for name, way in ways.items()}
        ours = logits.pop("ours")
        for name, theirs in logits.items():
            own = ours[: len(theirs)]
            if not torch.equal(own.isfinite(), theirs.isfinite()):
                raise DisagreementError(
                    f"{case}: ours and {name} keep other candidates at step {step}"
                )
            largest = max(largest, _difference(own, theirs))
            if not largest <= TOLERANCE:
                raise DisagreementError(
                    f"{case}: ours and {name} differ by {largest:.2g} at step {step}, "
                    f"where {TOLERANCE:g} is allowed"
                )
        for way in ways.values():
            way.accept(ours.argmax(-1))
    return largest


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b)[a.isfinite()].abs().max())
