"""Bootstrap intervals of a mean over prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from guided_decode.lab.intervals import wilson

Floats = npt.NDArray[np.float64]

DRAWS = 9_999
# Numbers of one part of the draws, 32 MiB of them.
_AT_ONCE = 1 << 22
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def leaves_out(self, value: float) -> bool:
        """Whether a value lies outside."""
        return value < self.low or value > self.high


def bootstrap(values: npt.ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of values and its bootstrap interval: bias-corrected and accelerated (Efron 1987).

    Values of which all are equal have no spread to draw from: of these the interval is the mean.
    `scipy.stats.bootstrap` with the same draws finds the same (tests/lab/test_bootstrap.py).

    Args:
        values: float [n], one a prompt, n at least 1; prompts are independent, what is under one of
            them (seeds, say) is not.
        draws: resamples.
        seed: of the draws.

    Raises ValueError: none, or one that is no finite number.
    """
    own = _checked(values)
    mean = float(own.mean())
    if np.ptp(own) == 0.0:
        return Interval(mean, mean, mean)
    means = _resampled_means(own, draws, seed)
    share = float((means < mean).mean() + (means <= mean).mean()) / 2
    low, high = 0.025, 0.975
    if 0.0 < share < 1.0:
        bias, acceleration = _NORMAL.inv_cdf(share), _acceleration(own)
        low, high = (_adjusted(each, bias, acceleration) for each in (low, high))
    ends = np.quantile(means, [low, high])
    return Interval(mean, float(ends[0]), float(ends[1]))


def bootstrap_of_rewards(values: npt.ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The same; where every prompt is at 0, or every one at 1, Wilson's interval of so many.

    A bootstrap of nothing but successes says that there can be no failure. Raises as `bootstrap`.
    """
    own = _checked(values)
    found = bootstrap(own, draws=draws, seed=seed)
    if np.ptp(own) == 0.0 and found.mean in (0.0, 1.0):
        return Interval(found.mean, *wilson(round(found.mean * len(own)), len(own)))
    return found


def _checked(values: npt.ArrayLike) -> Floats:
    own = np.asarray(values, dtype=np.float64)
    if own.ndim != 1 or not len(own) or not np.isfinite(own).all():
        raise ValueError(f"{own.shape} values, of which {int(np.isfinite(own).sum())} are finite: "
                         "expected a list of finite numbers")  # fmt: skip
    return own


def _resampled_means(values: Floats, draws: int, seed: int) -> Floats:
    rng, n = np.random.default_rng(seed), len(values)
    parts, rows = [], max(1, _AT_ONCE // n)
    for first in range(0, draws, rows):
        drawn = rng.integers(0, n, size=(min(rows, draws - first), n))
        parts.append(values[drawn].mean(axis=-1))
    return np.concatenate(parts)


def _acceleration(values: Floats) -> float:
    """A sixth of the skewness of the jackknife's means."""
    n = len(values)
    without = (values.sum() - values) / (n - 1)
    apart = without.mean() - without
    return float((apart**3).sum() / (6 * (apart**2).sum() ** 1.5))


def _adjusted(level: float, bias: float, acceleration: float) -> float:
    shifted = bias + _NORMAL.inv_cdf(level)
    found = _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))
    return level if math.isnan(found) else found
