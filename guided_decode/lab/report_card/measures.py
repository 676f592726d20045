"""How well values along responses tell what these come to: rank, calibration, consistency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guided_decode.lab.ranks import auc, spearman

# Of a response's tokens, rounded up.
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
BINS = 10


@dataclass(frozen=True, slots=True)
class Rank:
    """How values after a fraction of each response rank what the responses come to.

    auc: of rewards above `threshold` against the others; None where all are alike. spearman: of
    the rewards; None where they or the values are all equal.
    """

    fraction: float
    auc: float | None
    spearman: float | None


@dataclass(frozen=True, slots=True)
class Bin:
    """Prefixes with values that lie together: how many, their mean value, what they came to."""

    count: int
    value: float
    reward: float


def value_at(values: Tensor, fraction: float) -> float:
    """The value after a fraction of a response's tokens, rounded up.

    values: float32 [prefixes], the prompt's first.
    """
    return float(values[math.ceil(fraction * (len(values) - 1))])


def threshold_of(rewards: Sequence[float]) -> float:
    """What counts as right lies above it: 0.5 of 0 and 1, the lower of two values, else the
    median."""
    known = sorted(set(rewards))
    if len(known) == 2:
        return sum(known) / 2
    return float(np.median(rewards))


def rank_at(values: Sequence[Tensor], rewards: Sequence[float], fraction: float) -> Rank:
    """The ranks of values after `fraction` of each response."""
    read = [value_at(each, fraction) for each in values]
    threshold = threshold_of(rewards)
    right = [reward > threshold for reward in rewards]
    both = any(right) and not all(right)
    correlation = spearman(read, rewards)
    return Rank(
        fraction,
        auc(read, right) if both else None,
        None if math.isnan(correlation) else correlation,
    )


def calibration(
    values: Sequence[Tensor], rewards: Sequence[float], bins: int = BINS
) -> tuple[list[Bin], float]:
    """The calibration curve over all prefixes, and the expected calibration error.

    Bins hold equally many prefixes, by quantiles of their values, so that they fit values of any
    unit; the error is the mean over prefixes of |mean value − mean reward| of their bin.
    """
    read = torch.cat(list(values)).double().numpy()
    came_to = np.repeat(np.asarray(rewards, dtype=np.float64), [len(each) for each in values])
    edges = np.percentile(read, np.linspace(0, 100, bins + 1)[1:-1])
    which = np.searchsorted(edges, read)
    found = [
        Bin(int(own.sum()), float(read[own].mean()), float(came_to[own].mean()))
        for own in (which == i for i in range(bins))
        if own.any()
    ]
    error = sum(each.count * abs(each.value - each.reward) for each in found) / len(read)
    return found, error


def bellman_residual(values: Sequence[Tensor]) -> float | None:
    """Mean of (V(s_t) − V(s_t+1))² over all tokens that lie between two prefixes; None: there is
    none.

    Nothing is paid before the end, so V is a martingale under the policy: what is left of the
    residual for the right V is how much single tokens decide.
    """
    steps = torch.cat([each.double().diff() for each in values])
    return float(steps.square().mean()) if len(steps) else None


def last_step_error(values: Sequence[Tensor], rewards: Sequence[float]) -> float:
    """Mean of (V − reward)² at each response's last prefix."""
    last = torch.stack([each[-1] for each in values]).double()
    return float((last - torch.tensor(rewards, dtype=torch.float64)).square().mean())
