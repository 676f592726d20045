"""The prefix cache of one model: where each row stands, what it still has to forward."""

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_decode.cache.anchor import Anchor
from guided_decode.cache.blocks import NO_INTS
from guided_decode.cache.one_process import OneProcess
from guided_decode.cache.pool import SlotPool
from guided_decode.cache.radix import RadixTree
from guided_decode.cache.radix_node import Node
from guided_decode.cache.row_work import RowWork
from guided_decode.cache.slot_tables import Piece, SlotTables
from guided_decode.growable import Ints
from guided_decode.prefix import HandleState, PrefixHandle

# Slot tables take no more than this share of the pool's bytes, or than a small pool's would need.
TABLE_SHARE = 1 / 8
_SMALL_TABLES = 1 << 20


@dataclass(slots=True, frozen=True)
class Placement:
    """A row in the cache: its work, and the slots of its candidates, int64 [k], -1 where padded."""

    work: RowWork
    last_slot: int
    candidate_slots: Ints
    hits: int


class PrefixCache(OneProcess):
    """A radix tree over a slot pool, and a slot table for each live row.

    Rows are placed between `begin_batch` and `end_batch`; what a batch placed is pinned until then.
    Whoever places rows, or reads what was written for them, holds `lock` from first to last.
    """

    def __init__(self, pool: SlotPool, *, table_size: tuple[int, int] | None = None) -> None:
        """
        Args:
            pool: where keys and values lie.
            table_size: rows and width of the slot tables to begin with, for those who hold on to
                where they lie; None: small ones, which grow.
        """
        self.lock = threading.RLock()
        self.pool = pool
        self.tree = RadixTree(pool)
        self._table_size = table_size
        self.tables = self._new_tables(table_size)
        # By the handle's serial.
        self.anchors: dict[int, Anchor] = {}
        # Of handles that are gone, which may still ride.
        self.gone: deque[Anchor] = deque()
        # Whether rows that go on by a candidate are handled together: it changes cost only.
        self.rides = True
        # Rows that were, so far.
        self.ridden = 0
        # Slot tables of this batch's plain prefixes, and of handles that are not placed yet.
        self._scratch: set[int] = set()
        self._pieces: list[Piece] = []
        self._points: list[Ints] = []
        self._placed = 0

    def __copy__(self) -> "PrefixCache":
        """An empty one: what is cached belongs to handles and forwards of the original."""
        copied = PrefixCache(self.pool.like(self.capacity), table_size=self._table_size)
        copied.rides = self.rides
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefixCache":
        copied: PrefixCache = memo.setdefault(id(self), self.__copy__())
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes of device memory: the pool, and the slot tables beside it."""
        return self.pool.nbytes + self.tables.nbytes

    @property
    def capacity(self) -> int:
        """Slots of the pool, in tokens."""
        return self.pool.capacity

    @property
    def free_slots(self) -> int:
        return self.pool.free_slots

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache: prefixes and scored candidates."""
        with self.lock:
            return sum(len(slots) for slots in self.tree.owned())

    @property
    def pinned(self) -> int:
        """Nodes that the batch in progress holds; 0 between calls."""
        with self.lock:
            nodes = sum(node.stamp == self.tree.clock for node in self.tree.nodes())
            return nodes + self.tree.riders.pinned

    @property
    def operations(self) -> int:
        """Node operations so far: the host's work on the tree."""
        return self.tree.operations

    def clear(self) -> None:
        """Empties the cache. Changes cost, never an answer."""
        with self.lock:
            self.tree.clear()
            self.end_batch()

    def drop_candidates(self) -> None:
        """Frees the scored candidates that no prefix has taken since, between batches."""
        with self.lock:
            self.tree.drop_candidates()

    def check(self) -> None:
        """Asserts that every slot is either free or owned by exactly one token."""
        with self.lock:
            slots = np.concatenate([self.pool.free_ids, *self.tree.owned()])
            known = f"{len(slots)} of {self.capacity} slots accounted for"
            assert len(slots) == self.capacity, known
            assert len(np.unique(slots)) == self.capacity, "a slot is owned twice"
            handles = len(self.anchors)
            assert self.tables.open_rows == handles, "a slot table outlived its row"

    def begin_batch(self) -> None:
        self._placed = 0
        while self.gone:
            anchor = self.gone.popleft()
            if anchor.number >= 0:
                self.tree.riders.leave(anchor)
        self.tree.begin_batch()

    def end_batch(self) -> None:
        """Unpins what the batch placed."""
        while self._scratch:
            self.tables.close_row(self._scratch.pop())
        self._pieces.clear()
        self._points.clear()
        self.tree.begin_batch()

    def note(self, table_rows: Ints, positions: Ints, slots: Ints) -> None:
        """Has tokens written to slot tables, each [n], with the other rows' of the batch."""
        points = np.empty((3, len(slots)), np.int64)
        points[0], points[1], points[2] = table_rows, positions, slots
        self._points.append(points)

    def count_ridden(self, rows: int) -> None:
        """Notes rows of the batch that were placed together, beside `place`."""
        self._placed += rows
        self.ridden += rows

    def write_tables(self, *, told: bool = True) -> list[Piece]:
        """Brings the device's slot tables up to date with the rows placed so far.

        Returns what it wrote, if it is told, for tables elsewhere that follow these.
        """
        written, self._pieces = self._pieces, []
        points, self._points = self._points, []
        if points and written:
            # Written together: of an entry that is named twice nobody knows which is taken.
            ride = {row for some in points for row in some[0].tolist()}
            assert ride.isdisjoint(row for row, _, _ in written), "a row rides, and does not"
        self.tables.write(written, points)
        if told:
            for row, position, slot in (each for some in points for each in some.T.tolist()):
                written.append((row, position, np.array([slot], np.int64)))
        return written

    def place(
        self,
        prefix: PrefixHandle | Ints,
        skip: int,
        candidates: Ints = NO_INTS,
        *,
        state: HandleState | None = None,
        reread_last: bool = False,
        rides: int | None = None,
    ) -> Placement | None:
        """Finds or makes room for a row; None where the pinned rows leave too little.

        Args:
            prefix: handle or int64 [n].
            skip: leading tokens that the model does not see.
            candidates: distinct token ids, int64 [k].
            state: the handle's history as it was checked; None is what it holds now.
            reread_last: forward the last token even if it is cached, to read the model there.
            rides: a handle that went on by a candidate may ride from now on; the token that the
                scorer skips, or -1.
        """
        handle = None
        if isinstance(prefix, PrefixHandle):
            handle, state = prefix, prefix.state() if state is None else state
            tokens = state.tokens[skip:]
        else:
            tokens = prefix[skip:]
        found = self._position(handle, state, len(tokens), skip)
        if found is None:
            return None
        node, start, row = found
        node, depth, pieces = self.tree.match(tokens, node, start)
        if depth == len(tokens) and len(candidates):
            slots = self.tree.candidate_slots(node, depth, candidates)
        else:
            slots = np.full(len(candidates), -1, np.int64)
        fresh, missing = tokens[depth:], slots < 0
        new = int(np.count_nonzero(missing))
        if not self.tree.make_room(len(fresh) + new):
            return None
        if len(fresh):
            pieces.append(self.pool.take(len(fresh)))
            node = self.tree.insert(node, depth, fresh, pieces[-1])
        if new == len(candidates):
            own, own_slots = candidates, self.pool.take(new)
            slots = own_slots
        else:
            own, own_slots = candidates[missing], self.pool.take(new)
            slots[missing] = own_slots
        if new:
            self.tree.add_candidates(node, len(tokens), own, own_slots)
        path = pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else NO_INTS
        first = min(depth, len(tokens) - 1) if reread_last else depth
        last_slot = self._last_slot(node, len(tokens))
        if len(path):
            self._pieces.append((row, start, path))
        self._remember(handle, state, row, node, len(tokens), skip)
        self._placed += 1
        # Of a first token alone nobody knows yet whether the model sees it.
        went_on = 0 < start == len(tokens) - 1 and not len(fresh) and len(candidates)
        if handle is not None and rides is not None and self.rides and went_on:
            self.tree.riders.join(self.anchors[handle.serial], rides)
        return Placement(
            work=RowWork(
                table_row=row,
                first=first,
                prefix=tokens[first:].copy(),
                prefix_slots=self._tail(node, len(tokens), first, pieces),
                length=len(tokens),
                candidates=own,
                candidate_slots=own_slots,
            ),
            last_slot=last_slot,
            candidate_slots=slots,
            hits=first + len(candidates) - new,
        )

    def _tail(self, node: Node, length: int, first: int, pieces: list[Ints]) -> Ints:
        """Slots of the prefix tokens from `first` on: the freshly taken ones, or the last."""
        count = length - first
        if not count:
            return NO_INTS
        if pieces and len(pieces[-1]) >= count:
            return pieces[-1][-count:]
        return np.array([self._last_slot(node, length)], np.int64)

    def _last_slot(self, node: Node, length: int) -> int:
        return int(node.slots.view[length - node.start - 1])

    def _position(
        self, handle: PrefixHandle | None, state: HandleState | None, length: int, skip: int
    ) -> tuple[Node, int, int] | None:
        """Where to look up from, and the slot table to write to; None where tables are full."""
        anchor = None if handle is None else self.anchors.get(handle.serial)
        if anchor is not None and anchor.number >= 0:
            self.tree.riders.leave(anchor)
        if anchor is None or state is None:
            row = self._open_row(length)
            return None if row is None else (self.tree.root, 0, row)
        if not self.tables.widen(length):
            if self._placed:
                return None
            self._forget_tables()
            return self._position(handle, state, length, skip)
        valid = (
            anchor.generation == self.tree.generation
            and anchor.epoch == anchor.node.epoch
            and anchor.skip == skip
        )
        depth = anchor.depth
        if valid and anchor.version != state.version:
            assert handle is not None
            depth = min(depth, handle.kept(anchor.version) - skip)
            if depth > 0:
                self.tree.give_up(anchor.node, depth)
        known = valid and depth > 0
        return (anchor.node, depth, anchor.row) if known else (self.tree.root, 0, anchor.row)

    def _open_row(self, length: int) -> int | None:
        row = self.tables.open_row(length)
        if row is None and not self._placed:
            # Handles of other batches hold them; each is looked up in full the next time.
            self._forget_tables()
            row = self.tables.open_row(length)
        if row is not None:
            self._scratch.add(row)
        return row

    def _new_tables(self, size: tuple[int, int] | None = None) -> SlotTables:
        most = max(int(self.pool.nbytes * TABLE_SHARE), _SMALL_TABLES)
        device = self.pool.device
        return SlotTables(device, most) if size is None else SlotTables(device, most, size)

    def _forget_tables(self) -> None:
        """Starts again with small tables; nothing of the batch may have been placed."""
        self.tree.riders.leave_all()
        old, forgotten = self.tables, list(self.anchors.values())
        # In this order: an interruption on the way leaves no anchor to a row of other tables.
        self.anchors.clear()
        self._scratch.clear()
        self._points.clear()
        self.tables = self._new_tables()
        for anchor in forgotten:
            if anchor.closes is not None:
                anchor.closes.detach()
        # A handle that is going just now may still hand its row back, to the old ones.
        old.retire()

    def _remember(
        self,
        handle: PrefixHandle | None,
        state: HandleState | None,
        row: int,
        node: Node,
        depth: int,
        skip: int,
    ) -> None:
        if handle is None or state is None:
            return
        known = self.anchors.get(handle.serial)
        if known is None:
            self._scratch.discard(row)
            known = Anchor(row, node)
            known.closes = weakref.finalize(
                handle, _let_go, weakref.ref(self), handle.serial, self.tables, row
            )
            known.closes.atexit = False
            self.anchors[handle.serial] = known
        known.node, known.depth, known.epoch = node, depth, node.epoch
        known.generation, known.version, known.skip = self.tree.generation, state.version, skip


def _let_go(cache: "weakref.ref[PrefixCache]", serial: int, tables: SlotTables, row: int) -> None:
    """The end of a handle, at any moment; the next batch lets it ride no more."""
    of = cache()
    anchor = None if of is None else of.anchors.pop(serial, None)
    if of is not None and anchor is not None:
        of.gone.append(anchor)
    tables.close_row(row)
