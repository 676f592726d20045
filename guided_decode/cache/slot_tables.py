"""Slot tables: where on the device each row of a forward finds the slots of its tokens."""

from collections.abc import Sequence

import numpy as np
import torch

from guided_decode.growable import Ints

_ROWS, _WIDTH = 8, 64

# A row, the position that it is written from, and slots, int64 [n].
Piece = tuple[int, int, Ints]


class SlotTables:
    """A row of slot ids for each live prefix: entry p holds the slot of its token p.

    `table`: int32 [rows, width] on the device; it grows by doubling, up to `most_bytes`.
    """

    def __init__(
        self, device: torch.device, most_bytes: int, size: tuple[int, int] = (_ROWS, _WIDTH)
    ) -> None:
        """size: rows and width to begin with, as far as `most_bytes` hold them."""
        self._most_entries = most_bytes // torch.int32.itemsize
        width = max(_WIDTH, size[1])
        rows = min(size[0], self._most_entries // width)
        if rows < _ROWS:
            rows, width = _ROWS, _WIDTH
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._free = set(range(rows))

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the tables hold."""
        return self.table.nbytes

    @property
    def open_rows(self) -> int:
        return len(self.table) - len(self._free)

    def open_row(self, width: int) -> int | None:
        """A row that nobody else uses, for `width` tokens; None where there is no room for it."""
        if not self.widen(width):
            return None
        if not self._free:
            rows = len(self.table)
            more = min(rows, self._most_entries // self.table.shape[1] - rows)
            if more < 1:
                return None
            self.table = torch.cat([self.table, torch.zeros_like(self.table[:more])])
            self._free.update(range(rows, rows + more))
        return self._free.pop()

    def close_row(self, row: int) -> None:
        """Hands a row back."""
        self._free.add(row)

    def widen(self, width: int) -> bool:
        """Makes rows at least so wide; False where there is no room for that.

        The few rows that every table has are always as wide as they need.
        """
        rows, have = self.table.shape
        if width <= have:
            return True
        most = max(self._most_entries // rows, width if rows == _ROWS else 0)
        if width > most:
            return False
        new = min(max(width, 2 * have), most)
        wider = torch.zeros(rows, new, dtype=torch.int32, device=self.table.device)
        wider[:, :have] = self.table
        self.table = wider
        return True

    def write(self, pieces: list[Piece], points: Sequence[Ints] = ()) -> None:
        """Writes (row, first position, slots) pieces, in one copy to the device.

        points: int64 [3, n] each, rows, positions and slots, which are written too.
        """
        packed = [*points, _packed(pieces)] if pieces else points
        if packed:
            self._put(packed[0] if len(packed) == 1 else np.concatenate(packed, 1))

    def _put(self, packed: Ints) -> None:
        """packed: int64 [3, n], rows, positions and slots."""
        if self.table.device.type == "cpu":
            self.table.numpy()[packed[0], packed[1]] = packed[2]
            return
        rows, positions, slots = torch.from_numpy(packed).to(self.table.device, non_blocking=True)
        self.table[rows, positions] = slots.int()

    def reshape(self, rows: int, width: int) -> None:
        """Takes the shape of other tables, whose writes these follow; what is in both stays."""
        if self.table.shape == (rows, width):
            return
        table = self.table.new_zeros(rows, width)
        kept = self.table[:rows, :width]
        table[: len(kept), : kept.shape[1]] = kept
        self.table = table

    def retire(self) -> None:
        """Lets go of the memory, whoever still holds the tables."""
        self.table = self.table.new_zeros(0, 0)


def _packed(pieces: list[Piece]) -> Ints:
    """Pieces as rows, positions and slots, int64 [3, n]."""
    sizes = np.array([len(slots) for _, _, slots in pieces])
    starts = np.array([start for _, start, _ in pieces])
    packed = np.empty((3, int(sizes.sum())), np.int64)
    packed[0] = np.repeat(np.array([row for row, _, _ in pieces]), sizes)
    offsets = np.repeat(starts - np.concatenate([[0], sizes.cumsum()[:-1]]), sizes)
    packed[1] = np.arange(packed.shape[1]) + offsets
    packed[2] = np.concatenate([slots for _, _, slots in pieces])
    return packed
