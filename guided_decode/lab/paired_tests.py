"""Paired tests of two methods on the same prompts, and their correction for being many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 20_000
# Differences are counted in steps of 1/scale; the most steps whose sums are enumerated.
_SCALES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 18, 20, 24, 25, 30, 40, 50, 60, 100, 120,
           150, 200, 300, 400, 500, 600, 1000)  # fmt: skip
_MOST_STEPS, _MOST_WORK = 1 << 20, 1 << 29
_CLOSE = 1e-9
_AT_ONCE = 1 << 22


def sign_flip_test(differences: npt.ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p of the mean difference under random signs (Fisher's randomisation test).

    Under the null hypothesis a prompt's difference is as likely the other way round. Where the
    differences are multiples of a step, as those of rewards that are 0 or 1 are, all 2^n signs are
    counted, and p is exact: of single 0s and 1s McNemar's exact test. Others are drawn, with the
    given signs among the draws. `scipy.stats.permutation_test` finds the same.

    Args:
        differences: float [n], of one method minus another, one a prompt.
        draws, seed: of signs, where these are not counted.

    Raises ValueError: none, or one that is no finite number.
    """
    own = np.asarray(differences, dtype=np.float64)
    if own.ndim != 1 or not len(own) or not np.isfinite(own).all():
        raise ValueError(f"{own.shape} differences, of which {int(np.isfinite(own).sum())} are "
                         "finite: expected a list of finite numbers")  # fmt: skip
    moved = own[own != 0.0]
    if not len(moved):
        return 1.0
    steps = _steps(moved)
    below, above = _drawn(moved, draws, seed) if steps is None else _counted(steps)
    return min(1.0, 2.0 * min(below, above))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all of them together (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, most = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = most
    return adjusted


def _steps(moved: Floats) -> npt.NDArray[np.int64] | None:
    """The differences as whole numbers of one step; None: they have none that is large enough."""
    for scale in _SCALES:
        whole = np.rint(moved * scale)
        if not whole.all():
            # A difference is smaller than this step, however close to 0 it is.
            continue
        if np.abs(moved * scale - whole).max() < _CLOSE * scale:
            steps: npt.NDArray[np.int64] = whole.astype(np.int64)
            steps //= np.gcd.reduce(steps)
            total = int(np.abs(steps).sum())
            return steps if total <= min(_MOST_STEPS, _MOST_WORK // len(steps)) else None
    return None


def _counted(steps: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Chances that random signs give no more, and no less, than these."""
    sizes = np.abs(steps)
    total = int(sizes.sum())
    # Of the sum of those that are positive, each of which is so or not.
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for size in sizes:
        moved = np.zeros_like(chance)
        moved[size:] = chance[: len(chance) - size]
        chance = (chance + moved) / 2
    seen = (int(steps.sum()) + total) // 2
    return float(chance[: seen + 1].sum()), float(chance[seen:].sum())


def _drawn(moved: Floats, draws: int, seed: int) -> tuple[float, float]:
    rng, seen = np.random.default_rng(seed), float(moved.sum())
    slack = 1e-12 * float(np.abs(moved).sum())
    below = above = 1
    rows = max(1, _AT_ONCE // len(moved))
    for first in range(0, draws, rows):
        count = min(rows, draws - first)
        signs = rng.integers(0, 2, size=(count, len(moved)), dtype=np.int8) * 2.0 - 1.0
        sums = signs @ np.abs(moved)
        below += int((sums <= seen + slack).sum())
        above += int((sums >= seen - slack).sum())
    return below / (draws + 1), above / (draws + 1)
