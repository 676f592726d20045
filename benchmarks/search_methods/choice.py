"""The settings of each budget, chosen on the validation prompts."""

from collections.abc import Iterable, Mapping

from benchmarks.search_methods.records import Total
from benchmarks.search_methods.settings import Setting

# Budgets, in total tokens of plain sampling.
RUNGS = (2.0, 4.0, 8.0)
# A draw and its judgement are two tokens for one of plain's, and their ends a little more.
TOLERANCE = 0.05
COUNTINGS = ("drawn", "forwarded")


def choose(
    settings: Iterable[Setting],
    totals: Mapping[str, Total],
    plain: Total,
    rung: float,
    counting: str,
) -> dict[str, Setting]:
    """By method, the setting with the best accuracy among those whose mean tokens are at most
    `rung` times plain's and 5% more; of equals the cheapest. A method without one that fits is
    left out."""
    limit = (1 + TOLERANCE) * rung * plain.tokens(counting)
    chosen: dict[str, Setting] = {}
    for setting in settings:
        total = totals.get(setting.key)
        if total is None or total.tokens(counting) > limit:
            continue
        best = chosen.get(setting.method)
        if best is None or _merit(total, counting) > _merit(totals[best.key], counting):
            chosen[setting.method] = setting
    return chosen


def _merit(total: Total, counting: str) -> tuple[float, float]:
    return total.accuracy, -total.tokens(counting)
