"""What the leader of a sharded model tells its followers, as plain numbers, int64 [n].

Every order begins with what it is (`Order`) and which model it is for. A forward goes on with its
tokens (`PackedBatch.host`), its segments, the tokens whose logits are read, and what was written to
the slot tables since the last one: nothing that a follower knows, and nothing of a prefix that is
cached.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

import numpy as np

from guided_decode.cache.slot_tables import Piece
from guided_decode.forward.packed import Segment
from guided_decode.growable import Ints

_SEGMENT = 6
_NOTHING_READ = -1


class Order(IntEnum):
    """What a follower does: ends, runs a forward, or reads its changed weights."""

    END = 0
    FORWARD = 1
    FOLLOW = 2


@dataclass(slots=True, frozen=True)
class Forward:
    """One packed forward.

    tokens: int64 [3, n], ids, positions and slots. segments: as of `PackedBatch`. read: int64 [m],
    tokens whose logits are wanted; None for hidden states. table: rows and width of the leader's
    slot tables. writes: what was written to them, each write a list of (row, start, slots).
    """

    tokens: Ints
    segments: Sequence[Segment]
    read: Ints | None
    table: tuple[int, int]
    writes: list[list[Piece]]


def encoded(model: int, forward: Forward) -> Ints:
    """The order of a forward of the model with this number."""
    read = _NOTHING_READ if forward.read is None else len(forward.read)
    sizes = [forward.tokens.shape[1], len(forward.segments), read, len(forward.writes)]
    parts: list[Ints] = [
        np.array([Order.FORWARD, model, *sizes, *forward.table], np.int64),
        forward.tokens.ravel(),
        np.array([astuple(segment) for segment in forward.segments], np.int64).ravel(),
    ]
    if forward.read is not None:
        parts.append(forward.read)
    for write in forward.writes:
        heads = [len(write)]
        for row, start, slots in write:
            heads += [row, start, len(slots)]
        parts.append(np.array(heads, np.int64))
        parts += [slots for _, _, slots in write]
    return np.concatenate(parts)


def decoded(order: Ints) -> Forward:
    """The forward of an order."""
    count, segments, read, writes, rows, width = order[2:8].tolist()
    rest = _Rest(order, 8)
    return Forward(
        tokens=rest.take(3 * count).reshape(3, count),
        segments=[
            Segment(*each) for each in rest.take(_SEGMENT * segments).reshape(-1, 6).tolist()
        ],
        read=None if read == _NOTHING_READ else rest.take(read),
        table=(rows, width),
        writes=[rest.write() for _ in range(writes)],
    )


class _Rest:
    """What of an order is still to be read."""

    def __init__(self, order: Ints, at: int) -> None:
        self._order, self._at = order, at

    def take(self, count: int) -> Ints:
        taken = self._order[self._at : self._at + count]
        self._at += count
        return taken

    def write(self) -> list[Piece]:
        heads = self.take(3 * int(self.take(1)[0])).reshape(-1, 3).tolist()
        return [(row, start, self.take(count)) for row, start, count in heads]
