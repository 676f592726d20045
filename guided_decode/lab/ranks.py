"""Figures of merit that read ranks alone: area under the ROC curve, Spearman's correlation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def auc(scores: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
    """Chance that a right response scores above a wrong one, ties counted half.

    Args:
        scores: float [n].
        outcomes: bool [n]; both classes must occur.

    Raises ValueError: one class alone.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        raise ValueError(f"AUC needs both outcomes, got {positives} right and {negatives} wrong.")
    won = ranks(values)[right].sum() - positives * (positives + 1) / 2
    return float(won / (positives * negatives))


def spearman(scores: npt.ArrayLike, rewards: npt.ArrayLike) -> float:
    """Correlation of the ranks of two lists, float [n] each; NaN where one is constant."""
    first, second = (ranks(np.asarray(each, dtype=np.float64)) for each in (scores, rewards))
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / scale) if scale else math.nan


def ranks(values: Floats) -> Floats:
    """Each value's rank from 1 on; of equal ones the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Ranks before a group of ties, plus the middle of its own.
    found: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return found
