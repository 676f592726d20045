"""One packed forward: the uncached prefix tokens and candidates of many rows, in one sequence."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_decode.cache.pool import SlotPool
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
    segments: list[Segment]
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
    work: list[RowWork], table: Tensor, pool: SlotPool, limit: int, *, fused: bool = False
) -> Iterator[PackedBatch]:
    """Cuts the rows' work, in order, into forwards of at most `limit` tokens.

    fused: attention goes through `kernels.lookahead_attention`, as it does on a GPU.
    """
    waiting: list[RowWork] = []
    room = limit
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
                yield _batch(waiting, table, pool, fused)
                waiting, room = [], limit
    if waiting:
        yield _batch(waiting, table, pool, fused)


def _batch(work: list[RowWork], table: Tensor, pool: SlotPool, fused: bool) -> PackedBatch:
    sizes = np.array([row.tokens for row in work])
    starts = np.concatenate([[0], sizes.cumsum()])
    segments = [
        Segment(int(start), len(w.prefix), len(w.candidates), w.first, w.length, w.table_row)
        for w, start in zip(work, starts, strict=False)
    ]
    packed = np.empty((3, int(starts[-1])), np.int64)
    np.concatenate([part for w in work for part in (w.prefix, w.candidates)], out=packed[0])
    np.concatenate([part for w in work for part in _positions(w)], out=packed[1])
    np.concatenate([p for w in work for p in (w.prefix_slots, w.candidate_slots)], out=packed[2])
    return batch_of(packed, segments, table, pool, fused=fused)


def batch_of(
    packed: Ints,  # int64 [3, tokens]: ids, positions, slots
    segments: list[Segment],
    table: Tensor,
    pool: SlotPool,
    *,
    fused: bool,
) -> PackedBatch:
    """A forward of these tokens, on the pool's device; arguments as of `PackedBatch`."""
    tokens, rows = packed.shape[1], len(segments) if fused else 0
    # In one copy to the device. What begins in it begins at a multiple of 16 bytes, whatever the
    # number of tokens: kernels are compiled for that.
    width = tokens + tokens % 2
    host = np.zeros(3 * width + -(-3 * rows // 2), np.int64)
    host[: 3 * width].reshape(3, width)[:, :tokens] = packed
    table_rows = host[3 * width :].view(np.int32)[: 3 * rows].reshape(rows, 3)
    if fused:
        table_rows[:] = [(s.start, s.prefix + s.candidates, s.table_row) for s in segments]
    copied = torch.from_numpy(host).to(pool.device, non_blocking=True)
    stacked = copied[: 3 * width].view(3, width)[:, :tokens]
    token_ids, positions, slots = stacked.unbind()
    batch = PackedBatch(stacked, token_ids, positions, slots, segments, table, pool, host=packed)
    if not fused:
        return batch
    return replace(
        batch,
        segment_table=copied[3 * width :].view(torch.int32)[: 3 * rows].view(rows, 3),
        most_queries=int(table_rows[:, 1].max()),
        most_positions=int(packed[1].max()),
    )


def _positions(work: RowWork) -> tuple[Ints, Ints]:
    """Positions of a row's prefix tokens, and of its candidates, which share one."""
    prefix = np.arange(work.first, work.first + len(work.prefix), dtype=np.int64)
    return prefix, np.full(len(work.candidates), work.length, np.int64)
