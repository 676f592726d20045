"""One step of the rows that ride: found before anything changes, then placed all at once."""

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guided_decode.cache.riders import Steps
from guided_decode.cache.row_work import RowWork
from guided_decode.growable import Ints
from guided_decode.prefix import PrefixHandle

if TYPE_CHECKING:
    from guided_decode.cache.prefix_cache import PrefixCache


class Ride(NamedTuple):
    """Rows of a batch that go on by a candidate of their last step.

    prefixes: the whole batch's. rows: int64 [n], which of the batch, ascending. lengths: int64 [n],
    tokens of their prefixes, as the model sees them. clock: the tree's when they were found; what
    they say is true until it goes on.
    """

    prefixes: Sequence[Any]
    rows: Ints
    steps: Steps
    lengths: Ints
    clock: int

    def only(self, kept: NDArray[np.bool_]) -> "Ride":
        """Those of them that are kept, bool [n]."""
        return self if kept.all() else self._of(kept)

    def _of(self, which: NDArray[Any]) -> "Ride":
        steps = Steps(*(each[which] for each in self.steps))
        return self._replace(rows=self.rows[which], steps=steps, lengths=self.lengths[which])

    def among(self, prefixes: Sequence[Any]) -> "Ride | None":
        """Those of them that are rows of another batch too, by the prefixes' identity; None where
        that has others, which nobody looked up, or one twice, of which only one would go on."""
        same = len(prefixes) == len(self.prefixes)
        if same and all(map(operator.is_, prefixes, self.prefixes)):
            return self
        asked = set(map(id, prefixes))
        if len(asked) < len(prefixes) or not asked <= set(map(id, self.prefixes)):
            return None
        places = {id(self.prefixes[row]): place for place, row in enumerate(self.rows.tolist())}
        which = np.array([places.get(id(prefix), -1) for prefix in prefixes], np.int64)
        rows = (which >= 0).nonzero()[0]
        return self._of(which[rows])._replace(prefixes=prefixes, rows=rows)


@dataclass(slots=True, frozen=True)
class RideWork:
    """What they ask of the next forward: candidates after whole prefixes.

    table_rows, lengths, last_slots: int64 [n]. candidates, slots: int64 [n, k], -1 where padded.
    tokens: those that are not padding.
    """

    table_rows: Ints
    lengths: Ints
    last_slots: Ints
    candidates: Ints
    slots: Ints
    tokens: int

    @property
    def is_padded(self) -> bool:
        """Whether some of the candidates are padding."""
        return self.tokens < self.slots.size

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


def find_riders(cache: "PrefixCache", prefixes: Sequence[Any], skip_token: int) -> Ride | None:
    """The rows whose handles ride and went on by a candidate, or None. Changes no row.

    Args:
        cache: its lock is held.
        prefixes: as the caller has them.
        skip_token: the leading token that the model does not see, or -1.
    """
    riders = cache.tree.riders
    if not cache.rides or not len(riders):
        return None
    rows, numbers, tips = _live_riders(cache, prefixes)
    if not rows:
        return None
    ok, steps = riders.steps(numbers, tips, skip_token)
    lengths = riders.ends[steps.numbers] + 1 - riders.skips[steps.numbers]
    # The caller's list may be another one by the time that this is read.
    given, which = tuple(prefixes), np.array(rows, np.int64)
    ride = Ride(given, which, steps, lengths, cache.tree.clock).only(ok)
    return ride if len(ride.rows) else None


def fitting_riders(
    cache: "PrefixCache",
    ride: Ride,
    candidates: Ints,  # [rows, k]
    repeats: Sequence[bool],
    most_positions: int,
) -> Ride | None:
    """Those of them who go on together with these candidates, or None.

    Args:
        cache: its lock is held.
        ride: of `find_riders`, since when nothing was placed.
        candidates: int64, padded with -1.
        repeats: whether a row names a candidate twice, which then goes another way; empty where
            none does.
        most_positions: of the model.
    """
    k = candidates.shape[1]
    if not 0 < k <= cache.tree.riders.widest:
        return None
    if repeats:
        ride = ride.only(~np.array(repeats, bool)[ride.rows])
    if len(ride.rows) and int(ride.lengths.max()) + k > min(most_positions, cache.capacity):
        counts = (candidates[ride.rows] >= 0).sum(1)
        fits = ride.lengths + (counts > 0) <= most_positions
        fits &= ride.lengths + counts <= cache.capacity
        ride = ride.only(fits)
    if not len(ride.rows) or not cache.tables.widen(int(ride.lengths.max())):
        return None
    return ride


def _live_riders(
    cache: "PrefixCache", prefixes: Sequence[Any]
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
    if len(set(numbers)) < len(numbers):
        # Of a handle that comes twice, the second does not go on.
        times = Counter(numbers)
        kept = [i for i, number in enumerate(numbers) if times[number] == 1]
        rows, numbers = [rows[i] for i in kept], [numbers[i] for i in kept]
        tips = [tips[i] for i in kept]
    return rows, numbers, tips


def place_riders(
    cache: "PrefixCache", ride: Ride, candidates: Ints, *, padded: bool
) -> RideWork | None:
    """Places them, within a batch; None where there is no room for all, who then go the tree's way.

    candidates: int64 [rows, k] of the batch. padded: some are padding.
    """
    riders, who = cache.tree.riders, ride.steps.numbers
    last_slots = riders.advance(ride.steps)
    own = candidates if len(who) == len(candidates) else candidates[ride.rows]
    total = int(np.count_nonzero(own >= 0)) if padded else own.size
    if not cache.tree.make_room(total):
        _leave(cache, who)
        return None
    table_rows = riders.table_rows[who]
    cache.note(table_rows, ride.lengths - 1, last_slots)
    if padded:
        slots = np.full(own.shape, -1, np.int64)
        slots[own >= 0] = cache.pool.take(total)
    else:
        slots = cache.pool.take(total).reshape(own.shape)
    riders.score(who, own, slots, padded=padded)
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
