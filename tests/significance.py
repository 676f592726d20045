"""p-values by torch alone, for tests that run where scipy is not installed."""

from collections.abc import Callable

import torch
from torch import Tensor

_TERMS = 100


def chi_squared_p(observed: Tensor, expected: Tensor) -> float:
    """Pearson's test of counts, [n] each with one sum: the chance of a larger statistic."""
    observed, expected = observed.double(), expected.double()
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor(len(observed) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def kolmogorov_p(sample: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov's test of many draws, [n], against a distribution function: asymptotic p-value."""
    n = len(sample)
    expected = distribution(sample.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()
    k = torch.arange(1, _TERMS + 1, dtype=torch.float64)
    signs = (-1.0) ** (k - 1)
    return float(2 * (signs * (-2 * k.square() * n * distance.square()).exp()).sum())
