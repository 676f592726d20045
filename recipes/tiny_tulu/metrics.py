"""Figures of merit: area under the ROC curve, and the paired bootstrap."""

import numpy as np
import numpy.typing as npt

from guided_decode.lab.ranks import auc

__all__ = ["auc", "paired_bootstrap"]


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
