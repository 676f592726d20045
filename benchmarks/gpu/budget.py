"""Time: shares of parts in a whole, and a part's own deadline."""

import time
from collections.abc import Callable, Mapping


class Budget:
    """Seconds for all parts; what a part leaves over, or takes too much, the later ones share."""

    def __init__(
        self,
        total: float,
        shares: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """shares: the parts in the order they run in, with their weights."""
        self._shares = dict(shares)
        self._clock = clock
        self._end = clock() + total

    @property
    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def allot(self, part: str) -> float:
        """Seconds of the part that runs now: what is left, by its share among those to come."""
        names = list(self._shares)
        to_come = [self._shares[name] for name in names[names.index(part) :]]
        return self.left * to_come[0] / sum(to_come)


class Deadline:
    """When a part has to be done."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def allows(self, seconds: float) -> bool:
        """Whether so much can still be begun."""
        return seconds <= self.left
