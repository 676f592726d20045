"""How well values say half-way what a response will earn."""

import numpy as np
import numpy.typing as npt

from guided_decode.lab.ranks import auc, spearman

__all__ = ["auc", "foresight", "spearman"]


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
