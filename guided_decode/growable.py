"""An append-only int64 array: amortised O(1) appends, and views that numpy can compare."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class GrowableInts:
    """int64 values in a buffer that doubles; `view` is valid until the next append."""

    __slots__ = ("_buffer", "length")

    def __init__(self, values: Ints | None = None) -> None:
        self._buffer = np.empty(16, np.int64) if values is None else np.array(values, np.int64)
        self.length = 0 if values is None else len(values)

    def __len__(self) -> int:
        return self.length

    def __copy__(self) -> "GrowableInts":
        return GrowableInts(self.view)

    @property
    def view(self) -> Ints:
        """The values, int64 [length], without a copy."""
        return self._buffer[: self.length]

    @property
    def last(self) -> int:
        """The last value; -1 where there is none."""
        return self._buffer.item(self.length - 1) if self.length else -1

    def append(self, value: int) -> None:
        """Appends one value."""
        if self.length == len(self._buffer):
            self.extend(np.array([value], np.int64))
            return
        self._buffer[self.length] = value
        self.length += 1

    def extend(self, values: Ints) -> None:
        """Appends values, int64 [n]."""
        end = self.length + len(values)
        if end > len(self._buffer):
            grown = np.empty(max(end, 2 * len(self._buffer)), np.int64)
            grown[: self.length] = self.view
            self._buffer = grown
        self._buffer[self.length : end] = values
        self.length = end

    def truncate(self, length: int) -> Ints:
        """Drops what is behind `length` and returns a copy of it."""
        dropped = self.view[length:].copy()
        self.length = length
        return dropped
