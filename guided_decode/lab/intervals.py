"""Intervals of what is counted, and of means."""

import math
import statistics
from collections.abc import Sequence

# Two-sided 95% of the normal distribution.
_Z = 1.959963984540054


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), which holds near 0 and 1 too."""
    if not 0 <= right <= of or of < 1:
        raise ValueError(f"{right} of {of}: expected a count out of at least one")
    share, z2 = right / of, _Z**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean of independent values, by their deviation (normal).

    Raises ValueError: there is none.
    """
    if not values:
        raise ValueError("the interval of a mean needs at least one value")
    mean = statistics.fmean(values)
    half = _Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean - half, mean + half
