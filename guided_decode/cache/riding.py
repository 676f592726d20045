"""One step of the rows that ride: found before anything changes, then placed all at once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guided_decode.cache.riders import Steps
from guided_decode.cache.row_work import RowWork
from guided_decode.growable import Ints
from guided_decode.prefix import PrefixHandle

if TYPE_CHECKING:
    from guided_decode.cache.prefix_cache import PrefixCache


class Ride(NamedTuple):
    """Rows of a batch that go on by a candidate.

    prefixes: the whole batch's. rows: int64 [n], which of the batch, ascending. lengths: int64 [n],
    tokens of their prefixes, as the model sees them.
    """

    prefixes: Sequence[Any]
    rows: Ints
    steps: Steps
    lengths: Ints


@dataclass(slots=True, frozen=True)
class RideWork:
    """What they ask of the next forward: candidates after whole prefixes.

    table_rows, lengths, last_slots: int64 [n]. candidates, slots: int64 [n, k], -1 where padded.
    """

    table_rows: Ints
    lengths: Ints
    last_slots: Ints
    candidates: Ints
    slots: Ints
    tokens: int

    def rows(self) -> list[RowWork]:
        """The same row by row."""
        none = self.lengths[:0]
        work = []
        for i, (row, length) in enumerate(
            zip(self.table_rows.tolist(), self.lengths.tolist(), strict=True)
        ):
            real = self.slots[i] >= 0
            chosen, slots = self.candidates[i, real], self.slots[i, real]
            work.append(RowWork(row, length, none, none, length, chosen, slots))
        return work


def find_riders(
    cache: "PrefixCache",
    prefixes: Sequence[Any],
    candidates: Ints,  # [rows, k]
    repeats: Sequence[bool],
    skip_token: int,
    most_positions: int,
) -> Ride | None:
    """The rows whose handles ride and went on by a candidate, or None. Changes no row.

    Args:
        cache: its lock is held.
        prefixes: as the caller has them.
        candidates: int64, padded with -1.
        repeats: rows that name a candidate twice, which go another way.
        skip_token: the leading token that the model does not see, or -1.
        most_positions: of the model.
    """
    riders = cache.tree.riders
    if not len(riders) or not 0 < candidates.shape[1] <= riders.widest:
        return None
    rows, numbers, tips = _live_riders(cache, prefixes, repeats)
    if not rows:
        return None
    ok, steps = riders.steps(numbers, tips, skip_token)
    which = np.array(rows, np.int64)
    lengths = riders.ends[steps.numbers] + 1 - riders.skips[steps.numbers]
    counts = (candidates[which] >= 0).sum(1)
    ok &= lengths + (counts > 0) <= most_positions
    ok &= lengths + counts <= cache.capacity
    if not ok.all():
        which, lengths = which[ok], lengths[ok]
        steps = Steps(*(each[ok] for each in steps))
    if not len(which) or not cache.tables.widen(int(lengths.max())):
        return None
    return Ride(prefixes, which, steps, lengths)


def _live_riders(
    cache: "PrefixCache", prefixes: Sequence[Any], repeats: Sequence[bool]
) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
    """The rows whose handles ride, their riders' numbers, and where the handles are now."""
    anchors = cache.anchors
    rows: list[int] = []
    numbers: list[int] = []
    tips: list[tuple[int, int, int]] = []
    for i, prefix in enumerate(prefixes):
        if isinstance(prefix, PrefixHandle):
            anchor = anchors.get(prefix.serial)
            if anchor is not None and anchor.number >= 0:
                rows.append(i)
                numbers.append(anchor.number)
                tips.append(prefix.tip())
    if True in repeats or len(set(numbers)) < len(numbers):
        # Of a handle that comes twice, the second does not go on.
        times = Counter(numbers)
        kept = [i for i, n in enumerate(numbers) if times[n] == 1 and not repeats[rows[i]]]
        rows, numbers = [rows[i] for i in kept], [numbers[i] for i in kept]
        tips = [tips[i] for i in kept]
    return rows, numbers, tips


def place_riders(cache: "PrefixCache", ride: Ride, candidates: Ints) -> RideWork | None:
    """Places them, within a batch; None where there is no room for all, who then go the tree's way.

    candidates: int64 [rows, k] of the batch.
    """
    riders, who = cache.tree.riders, ride.steps.numbers
    last_slots = riders.advance(ride.steps)
    own = candidates if len(who) == len(candidates) else candidates[ride.rows]
    real = own >= 0
    total = int(np.count_nonzero(real))
    if not cache.tree.make_room(total):
        _leave(cache, who)
        return None
    table_rows = riders.table_rows[who]
    cache.note(table_rows, ride.lengths - 1, last_slots)
    slots = np.full(own.shape, -1, np.int64)
    slots[real] = cache.pool.take(total)
    riders.score(who, own, slots)
    riders.settle_some(who)
    cache.count_ridden(len(who))
    return RideWork(table_rows, ride.lengths, last_slots, own, slots, total)


def _leave(cache: "PrefixCache", who: Ints) -> None:
    """Those who had gone on stand in the tree, unpinned; their slot tables lack the last token."""
    riders = cache.tree.riders
    for anchor in [riders.anchors[number] for number in who.tolist()]:
        assert anchor is not None
        riders.leave(anchor)
        anchor.depth -= 1
    cache.tree.begin_batch()
