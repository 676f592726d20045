"""What each query of a packed forward reads: runs of neighbouring slots in place, others gathered.

A prompt takes neighbouring slots of a fresh pool, which are read without a copy; generated tokens
lie between the candidates that were not chosen. Attention does not mind the order of its keys:
only the mask has to follow it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guided_decode.forward.packed import PackedBatch, Segment
from guided_decode.forward.stretch import NO_RUNS, Runs, Stretch

# A shorter run costs more as two matrix products of its own than as a copy.
_SHORTEST_RUN = 64
# A longer chunk of prefix goes through fused attention, which wants its keys in order.
_LONGEST_SHORT_CHUNK = 64


def stretches(batch: PackedBatch, window: int | None) -> list[Stretch]:
    """The batch's queries with what they read, under a sliding window or none."""
    known = batch.stretches.get(window)
    if known is None:
        known = [part for segment in batch.segments for part in _split(batch, segment, window)]
        batch.stretches[window] = known
    return known


def _split(batch: PackedBatch, segment: Segment, window: int | None) -> list[Stretch]:
    if segment.prefix <= _LONGEST_SHORT_CHUNK:
        return [_short(batch, segment, segment.prefix, window)]
    chunk = [_long(batch, segment, window)]
    return [*chunk, _short(batch, segment, 0, window)] if segment.candidates else chunk


def _short(batch: PackedBatch, segment: Segment, chunk: int, window: int | None) -> Stretch:
    """The last `chunk` prefix tokens that a segment forwards, and its candidates."""
    n, middle = segment.candidates, segment.start + segment.prefix
    first = segment.first + segment.prefix - chunk
    low = _lowest(first, window)
    queries = slice(middle - chunk, middle + n)
    own = batch.positions[queries]
    # Under a window the later of the queries may not see all that the first one sees.
    cut = window is not None and chunk > 0 and first + chunk - 1 + (n > 0) - window >= low
    if cut:
        runs, before = NO_RUNS, _slots(batch, segment, low, first)
        columns = torch.cat([torch.arange(low, first, device=own.device), own])
        mask = _mask(own, columns, window, n, batch.dtype)
    else:
        runs, before = _in_place(batch, segment, low, first)
        seen = _mask(own, own, window, n, batch.dtype) if chunk else _each_itself(n, batch)
        mask = F.pad(seen, (len(before), 0))
    gathered = torch.cat([before, batch.slots[queries]])
    return Stretch(queries, runs, gathered, mask if len(own) > 1 else None)


def _long(batch: PackedBatch, segment: Segment, window: int | None) -> Stretch:
    """The prefix tokens that a segment forwards."""
    first, last = segment.first, segment.first + segment.prefix
    low = _lowest(first, window)
    queries = slice(segment.start, segment.start + segment.prefix)
    runs, slots = _in_place(batch, segment, low, last)
    if len(runs) != 1 or len(slots):
        runs, slots = NO_RUNS, _slots(batch, segment, low, last)
    mask = None
    if first or (window is not None and window < last):
        own = batch.positions[queries]
        columns = torch.arange(low, last, device=own.device)
        mask = _mask(own, columns, window, 0, batch.dtype)
    return Stretch(queries, runs, slots, mask, long=True)


def _lowest(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def _slots(batch: PackedBatch, segment: Segment, low: int, high: int) -> Tensor:
    return batch.table[segment.table_row, low:high].long()


def _in_place(batch: PackedBatch, segment: Segment, low: int, high: int) -> tuple[Runs, Tensor]:
    """Runs among a row's slots, and the slots outside them; other devices keep no table here."""
    slots = batch.table[segment.table_row, low:high]
    if slots.device.type != "cpu" or high - low < _SHORTEST_RUN:
        return NO_RUNS, slots.long()
    table = slots.numpy()
    jumps = (table[1:] - table[:-1] != 1).nonzero()[0]
    edges = np.empty(len(jumps) + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, jumps + 1, len(table)
    outside, runs = np.ones(len(table), bool), []
    for at in (edges[1:] - edges[:-1] >= _SHORTEST_RUN).nonzero()[0].tolist():
        start, end = edges[at], edges[at + 1]
        outside[start:end] = False
        runs.append((int(table[start]), int(table[end - 1]) + 1))
    return tuple(runs), torch.from_numpy(table[outside].astype(np.int64))


def _mask(
    queries: Tensor,  # [n] int64, positions
    columns: Tensor,  # [m] int64, positions
    window: int | None,
    candidates: int,
    dtype: torch.dtype,
) -> Tensor:
    """0 where a query sees a column, else −inf; the last queries are candidates, and columns."""
    behind = queries[:, None] - columns
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    if candidates:
        # They share a position, but none sees another.
        seen[-candidates:, -candidates:].fill_(False).fill_diagonal_(True)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _each_itself(candidates: int, batch: PackedBatch) -> Tensor:
    """The mask among a row's candidates, which share a position."""
    hidden = torch.full(
        (candidates, candidates), -torch.inf, dtype=batch.dtype, device=batch.positions.device
    )
    return hidden.fill_diagonal_(0.0)
