"""How well values say half-way what a response will earn."""

import numpy as np
import numpy.typing as npt

from recipes.tiny_tulu.metrics import auc

__all__ = ["auc", "foresight", "spearman"]


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of the two is constant."""
    a, b = _ranks(first), _ranks(second)
    if not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def foresight(task: str, values: npt.ArrayLike, rewards: npt.ArrayLike) -> float:
    """How well values order responses by their rewards, one of each a response.

    Rank correlation on sentiment. On constraints the area under the ROC curve, where a response is
    right that keeps them all. NaN where all rewards are alike.
    """
    earned = np.asarray(rewards, dtype=np.float64)
    if task == "sentiment":
        return spearman(values, earned)
    right = earned == 1.0
    return auc(values, right) if right.any() and not right.all() else float("nan")


def _ranks(numbers: npt.ArrayLike) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(
        np.asarray(numbers, dtype=np.float64), return_inverse=True, return_counts=True
    )
    ranks: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
