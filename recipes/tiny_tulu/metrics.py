"""Figures of merit: area under the ROC curve, and the paired bootstrap."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def auc(scores: npt.ArrayLike, outcomes: npt.ArrayLike) -> float:
    """Chance that a right response scores above a wrong one, ties counted half.

    Args:
        scores: float [n].
        outcomes: bool [n]; both classes must occur.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        raise ValueError(f"AUC needs both outcomes, got {positives} right and {negatives} wrong.")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # The mean rank of a group of ties: ranks before it, plus the middle of its own.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def paired_bootstrap(
    first: npt.ArrayLike, second: npt.ArrayLike, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `first - second` over the same prompts, float [n] each, and its 95% interval."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(difference), size=(draws, len(difference)))
    means = difference[rows].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
