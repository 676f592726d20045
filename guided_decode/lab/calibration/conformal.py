"""Split conformal thresholds: bounds that at most a share alpha of good responses ever crosses.

A trajectory crosses a lower bound where its minimum does. Of n good calibration trajectories with
minima m_1 to m_n, and a new good one's m, all exchangeable,

    P(m < the r-th smallest of m_1 .. m_n) <= r / (n + 1),    so r = floor(alpha · (n + 1))

is within alpha, whatever the distribution and however good the critic (split conformal prediction,
Papadopoulos et al. 2002). The probability is over calibration and new response together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from guided_decode.critics.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Threshold:
    """value: the bound. rank: which of the `of` calibration extremes it is, from the outermost."""

    value: float
    rank: int
    of: int


def least_of(alpha: float) -> int:
    """The fewest good calibration trajectories that alpha can be kept with."""
    return math.ceil(1 / _exact(alpha)) - 1


def lower_threshold(minima: Sequence[float], alpha: float) -> Threshold:
    """The largest bound such that a new trajectory falls below it with probability at most alpha.

    Args:
        minima: of the good calibration trajectories, float [n].
        alpha: in (0, 1).

    Raises ValueError: alpha outside (0, 1), or n too small for it.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha!r}: expected a share between 0 and 1")
    count = len(minima)
    rank = math.floor(_exact(alpha) * (count + 1))
    if rank < 1:
        raise ValueError(
            f"alpha={alpha:g} cannot be kept with {count} good responses of as many prompts: "
            f"expected at least {least_of(alpha)}, or a larger alpha"
        )
    return Threshold(sorted(minima)[rank - 1], rank, count)


def upper_threshold(maxima: Sequence[float], alpha: float) -> Threshold:
    """The same from above: a new trajectory exceeds it with probability at most alpha."""
    found = lower_threshold([-each for each in maxima], alpha)
    return Threshold(-found.value, found.rank, found.of)


def one_a_prompt(rollouts: Sequence[Rollout], seed: int) -> list[int]:
    """Indices of one rollout of each prompt, drawn before anything is looked at, in order.

    Responses to one prompt are alike, and so not exchangeable with one to a new prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rollouts), generator=generator).tolist()
    drawn: dict[tuple[int, ...], int] = {}
    for i in order:
        drawn.setdefault(rollouts[i].prompt, i)
    return sorted(drawn.values())


def _exact(alpha: float) -> Fraction:
    """The number that was written, so that 0.29 of 100 are 29."""
    return Fraction(repr(float(alpha)))
