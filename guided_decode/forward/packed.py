"""One packed forward: the uncached prefix tokens and candidates of many rows, in one sequence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_decode.cache.pool import SlotPool
from guided_decode.cache.riding import RideWork
from guided_decode.cache.row_work import RowWork
from guided_decode.forward.stretch import Stretch
from guided_decode.growable import Ints


@dataclass(slots=True, frozen=True)
class Segment:
    """A row's stretch of the packed sequence: prefix queries, then candidate queries."""

    start: int
    prefix: int
    candidates: int
    first: int
    length: int
    table_row: int


class Segments(Sequence[Segment]):
    """Segments out of numbers, int64 [n, 6], made when somebody asks for them."""

    def __init__(self, numbers: Ints) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def last_tokens(self) -> Ints:
        """Which tokens of the batch end their rows' prefixes, int64 [n]; rows that are cut short
        have none."""
        start, prefix, _, first, length, _ = self.numbers.T
        return (start + prefix - 1)[first + prefix == length]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Segments(self.numbers[index])
        return Segment(*self.numbers[index].tolist())

    def __iter__(self) -> Iterator[Segment]:
        return (Segment(*each) for each in self.numbers.tolist())


class How(NamedTuple):
    """Of a layer's attention: a factor of the scores, the positions that are seen, a bound."""

    scaling: float
    window: int | None
    softcap: float | None


@dataclass(slots=True, frozen=True)
class PackedBatch:
    """One forward. token_ids, positions, slots: int64 [tokens], on the model's device; `stacked`
    is the three of them, int64 [3, tokens], in the same memory, and `host` the same in numpy.

    A prefix query at position p reads the slots table[row, : p + 1]; a candidate reads
    table[row, :length] and itself. Every token's key and value go to its own slot.
    segments: on the host. segment_table: the same for `kernels.lookahead_attention`, int32 [n, 3]
    on the device; None where attention goes by `segments`. most_queries, most_positions: bounds
    of the segments' tokens and of the positions.
    stretches: by sliding window, what was worked out from the segments, once for all layers.
    copies: by device, the same batch for the layers that lie there.
    heard: by layer, how its module asked for attention; None: nobody wants to know.
    """

    stacked: Tensor
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    segments: Sequence[Segment]
    table: Tensor
    pool: SlotPool
    segment_table: Tensor | None = None
    most_queries: int = 0
    most_positions: int = 0
    host: Ints | None = None
    stretches: dict[int | None, list[Stretch]] = field(default_factory=dict)
    copies: "dict[torch.device, PackedBatch]" = field(default_factory=dict)
    heard: dict[int, How] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's keys."""
        return self.pool.keys[0].dtype

    def on(self, device: torch.device) -> "PackedBatch":
        """The batch for layers on a device, copied there once a forward.

        Of the slot table only the rows and columns that the batch reads.
        """
        if device == self.stacked.device:
            return self
        if device not in self.copies:
            self.copies[device] = self.copied(device)
        return self.copies[device]

    def copied(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device, over a table of its own."""
        rows = [segment.table_row for segment in self.segments]
        width = max(segment.length for segment in self.segments)
        used = torch.tensor(rows, dtype=torch.int64).to(self.table.device, non_blocking=True)
        tokens = len(self.token_ids)
        # Each of the three begins at a multiple of 16 bytes, as they do here.
        padded = torch.empty(3, tokens + tokens % 2, dtype=torch.int64, device=device)
        stacked = padded[:, :tokens].copy_(self.stacked, non_blocking=True)
        token_ids, positions, slots = stacked.unbind()
        segments = [replace(each, table_row=i) for i, each in enumerate(self.segments)]
        own = self.segment_table
        if own is not None:
            own = own.to(device, non_blocking=True, copy=True)
            own[:, 2] = torch.arange(len(rows), dtype=own.dtype, device=device)
        return replace(
            self,
            stacked=stacked,
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            segments=segments,
            table=self.table[used, :width].to(device, non_blocking=True),
            segment_table=own,
            stretches={},
            copies={},
        )


def pack(
    work: list[RowWork],
    table: Tensor,
    pool: SlotPool,
    limit: int,
    *,
    fused: bool = False,
    ride: RideWork | None = None,
) -> Iterator[PackedBatch]:
    """Cuts the rows' work, in order, into forwards of at most `limit` tokens.

    fused: attention goes through `kernels.lookahead_attention`, as it does on a GPU. ride: work
    that comes first.
    """
    if ride is not None and ride.tokens + sum(row.tokens for row in work) > limit:
        work, ride = [*ride.rows(), *work], None
    packed, segments = (
        _of_ride(ride) if ride is not None and ride.tokens else (_NO_TOKENS, _NO_ROWS)
    )
    waiting: list[RowWork] = []
    room = limit - packed.shape[1]
    for row in work:
        if row.tokens < room:
            if row.tokens:
                waiting.append(row)
                room -= row.tokens
            continue
        while row.tokens:
            piece, row = row.cut(room)
            waiting.append(piece)
            room -= piece.tokens
            if room == 0:
                yield _batch(waiting, packed, segments, table, pool, fused)
                waiting, room, packed, segments = [], limit, _NO_TOKENS, _NO_ROWS
    if waiting or packed.shape[1]:
        yield _batch(waiting, packed, segments, table, pool, fused)


_NO_TOKENS, _NO_ROWS = np.empty((3, 0), np.int64), np.empty((0, 6), np.int64)


def _batch(
    work: list[RowWork], packed: Ints, segments: Ints, table: Tensor, pool: SlotPool, fused: bool
) -> PackedBatch:
    """A forward of what is packed, and of this work behind it."""
    if work:
        own, rows = _of_rows(work, packed.shape[1])
        packed = own if not packed.shape[1] else np.concatenate([packed, own], 1)
        segments = rows if not len(segments) else np.concatenate([segments, rows])
    return batch_of(packed, Segments(segments), table, pool, fused=fused)


def _of_ride(ride: RideWork) -> tuple[Ints, Ints]:
    """Tokens, int64 [3, tokens], and segments, int64 [rows, 6]; rows without a token have none."""
    rows, k = ride.slots.shape
    segments = np.zeros((rows, 6), np.int64)
    segments[:, 3] = segments[:, 4] = ride.lengths
    segments[:, 5] = ride.table_rows
    packed = np.empty((3, ride.tokens), np.int64)
    if not ride.is_padded:
        by_row = packed.reshape(3, rows, k)
        by_row[0], by_row[1], by_row[2] = ride.candidates, ride.lengths[:, None], ride.slots
        segments[:, 0] = np.arange(0, rows * k, k)
        segments[:, 2] = k
        return packed, segments
    real = ride.slots >= 0
    counts = real.sum(1)
    packed[0] = ride.candidates[real]
    packed[1] = np.repeat(ride.lengths, counts)
    packed[2] = ride.slots[real]
    segments[:, 0] = counts.cumsum() - counts
    segments[:, 2] = counts
    return packed, segments[counts > 0]


def _of_rows(work: list[RowWork], start: int) -> tuple[Ints, Ints]:
    """The same of rows, whose first token is the batch's `start`-th."""
    sizes = np.array([row.tokens for row in work])
    starts = sizes.cumsum() - sizes + start
    segments = np.array(
        [(0, len(w.prefix), len(w.candidates), w.first, w.length, w.table_row) for w in work],
        np.int64,
    )
    segments[:, 0] = starts
    packed = np.empty((3, int(sizes.sum())), np.int64)
    np.concatenate([part for w in work for part in (w.prefix, w.candidates)], out=packed[0])
    np.concatenate([part for w in work for part in _positions(w)], out=packed[1])
    np.concatenate([p for w in work for p in (w.prefix_slots, w.candidate_slots)], out=packed[2])
    return packed, segments


def batch_of(
    packed: Ints,  # int64 [3, tokens]: ids, positions, slots
    segments: Sequence[Segment],
    table: Tensor,
    pool: SlotPool,
    *,
    fused: bool,
) -> PackedBatch:
    """A forward of these tokens, on the pool's device; arguments as of `PackedBatch`."""
    if not fused:
        stacked = torch.from_numpy(packed).to(pool.device, non_blocking=True)
        token_ids, positions, slots = stacked.unbind()
        return PackedBatch(stacked, token_ids, positions, slots, segments, table, pool, host=packed)
    tokens, rows = packed.shape[1], len(segments)
    # In one copy to the device. What begins in it begins at a multiple of 16 bytes, whatever the
    # number of tokens: kernels are compiled for that.
    width = tokens + tokens % 2
    host = np.zeros(3 * width + -(-3 * rows // 2), np.int64)
    host[: 3 * width].reshape(3, width)[:, :tokens] = packed
    table_rows = host[3 * width :].view(np.int32)[: 3 * rows].reshape(rows, 3)
    if isinstance(segments, Segments):
        numbers = segments.numbers
        table_rows[:] = numbers[:, (0, 1, 5)]
        table_rows[:, 1] += numbers[:, 2]
    else:
        table_rows[:] = [(s.start, s.prefix + s.candidates, s.table_row) for s in segments]
    copied = torch.from_numpy(host).to(pool.device, non_blocking=True)
    stacked = copied[: 3 * width].view(3, width)[:, :tokens]
    token_ids, positions, slots = stacked.unbind()
    return PackedBatch(
        stacked,
        token_ids,
        positions,
        slots,
        segments,
        table,
        pool,
        host=packed,
        segment_table=copied[3 * width :].view(torch.int32)[: 3 * rows].view(rows, 3),
        most_queries=int(table_rows[:, 1].max()),
        most_positions=int(packed[1].max()),
    )


def _positions(work: RowWork) -> tuple[Ints, Ints]:
    """Positions of a row's prefix tokens, and of its candidates, which share one."""
    prefix = np.arange(work.first, work.first + len(work.prefix), dtype=np.int64)
    return prefix, np.full(len(work.candidates), work.length, np.int64)
