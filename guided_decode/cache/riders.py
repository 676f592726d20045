"""Rows that go on by one of their last candidates, nearly all rows of a step, as arrays.

A rider is a handle whose prefix ends a leaf of the tree that nobody else extends. What it adds to
the leaf, tokens and the candidates scored after each, is kept in arrays [riders, TAIL] and enters
the tree when another row reaches the leaf's end, when the rider does anything but go on by a
candidate, when it is gone, when room is made of it, and after some tens of tokens.

A row that is read and then scored at one prefix, as a value gate's is, never rides: a handle that
did not go on since the last batch goes the tree's way, and does not join.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guided_decode.cache.anchor import Anchor
from guided_decode.cache.blocks import NEVER, NO_INTS, Block, TailBlocks
from guided_decode.growable import Ints

if TYPE_CHECKING:
    from guided_decode.cache.radix import RadixTree
    from guided_decode.cache.radix_node import Node

# Tokens of a tail, and from how many on it may enter the tree; not all riders in one step.
TAIL, _SETTLES = 64, 48
# More riders, and more candidates, go the tree's way.
_MOST_RIDERS, _MOST_WIDTH = 1024, 64


class Steps(NamedTuple):
    """Riders that go on by a candidate: who, and by which column of their last candidates.

    numbers, tokens, columns: int64 [n].
    """

    numbers: Ints
    tokens: Ints
    columns: Ints


class Riders:
    """The riders of one tree.

    Of rider r, p = 0 is the leaf's end when it joined or last settled, and p = count[r] where it
    stands. tail, tail_slots: int64 [riders, TAIL], token and slot p, from 1 on. tokens, slots:
    int64 [riders, TAIL, width], the candidates after p, -1 where there is none (any more). stamps:
    int64 [riders, TAIL], the batch that scored them. used: int64 [riders], the last batch.
    ends, versions, skips, skip_tokens, table_rows: int64 [riders], of their handles.
    """

    def __init__(self, tree: "RadixTree") -> None:
        # A tree goes when its last owner does, and the pool's memory with it.
        self._tree: RadixTree = weakref.proxy(tree)
        self.clear()

    def clear(self) -> None:
        """Forgets all of them, whose slots are the pool's again."""
        for anchor in getattr(self, "anchors", ()):
            if anchor is not None:
                anchor.number = -1
        self.anchors: list[Anchor | None] = []
        self._free: list[int] = []
        self._make(0, 0)

    def _make(self, riders: int, width: int) -> None:
        self.count, self.ends, self.versions, self.skips, self.skip_tokens, self.table_rows = (
            np.zeros(riders, np.int64) for _ in range(6)
        )
        self.used = np.zeros(riders, np.int64)
        self.tail, self.tail_slots = (np.full((riders, TAIL), -1, np.int64) for _ in range(2))
        self.tokens, self.slots = (np.full((riders, TAIL, width), -1, np.int64) for _ in range(2))
        self.stamps = np.full((riders, TAIL), NEVER, np.int64)

    @property
    def widest(self) -> int:
        """The most candidates of a rider."""
        return _MOST_WIDTH

    def __len__(self) -> int:
        return len(self.anchors) - len(self._free)

    def _grow(self, riders: int, width: int) -> None:
        """Makes room for so many riders, and candidates of each."""
        have = len(self.anchors)
        before = {name: each for name, each in vars(self).items() if isinstance(each, np.ndarray)}
        self._make(riders, min(_MOST_WIDTH, -(-width // 8) * 8))
        for name, kept in before.items():
            getattr(self, name)[tuple(slice(size) for size in kept.shape)] = kept
        self._free += range(riders - 1, have - 1, -1)
        self.anchors += [None] * (riders - have)

    def _widen(self, width: int) -> None:
        if width > self.tokens.shape[2]:
            self._grow(len(self.anchors), width)

    # Who rides.

    def join(self, anchor: Anchor, skip_token: int) -> None:
        """From now on the handle rides, if it ends a leaf alone: a prefix that the current batch
        placed, of the scorer's `skip_token`, -1 where there is none."""
        node = anchor.node
        alone = node.parent is not None and not node.children and node.rider is None
        if not alone or anchor.depth != node.end:
            return
        block = self._tree.block_at(node, node.end)
        tokens, slots = (NO_INTS, NO_INTS) if block is None else (block.tokens, block.slots)
        if len(tokens) > _MOST_WIDTH:
            return
        self._widen(len(tokens))
        if not self._free:
            if len(self.anchors) >= _MOST_RIDERS:
                return
            self._grow(max(8, 2 * len(self.anchors)), self.tokens.shape[2])
        number = self._free.pop()
        self.count[number] = 0
        self.tokens[number, 0, : len(tokens)] = tokens
        self.slots[number, 0, : len(tokens)] = slots
        if block is not None and len(tokens):
            self.stamps[number, 0] = block.stamp
            block.tokens = block.slots = NO_INTS
        node.blocks[-1] = None
        self.ends[number] = anchor.depth + anchor.skip
        self.versions[number], self.skips[number] = anchor.version, anchor.skip
        self.skip_tokens[number], self.table_rows[number] = skip_token, anchor.row
        self.used[number] = self._tree.clock
        self.anchors[number], anchor.number, node.rider = anchor, number, anchor

    def leave(self, anchor: Anchor) -> None:
        """The rider's tail and all its candidates enter the tree, where it then stands."""
        number, node = anchor.number, anchor.node
        self._settle([number])
        held = self.slots[number, 0] >= 0
        if held.any():
            stamp, tokens = int(self.stamps[number, 0]), self.tokens[number, 0, held]
            block = node.blocks[-1] = Block(stamp, tokens, self.slots[number, 0, held])
            self._tree.push_block(block)
        self.tokens[number, 0] = self.slots[number, 0] = -1
        self.stamps[number, 0] = NEVER
        node.rider, anchor.number = None, -1
        self.anchors[number] = None
        self._free.append(number)

    def leave_all(self) -> None:
        """The same of every rider."""
        for anchor in list(self.anchors):
            if anchor is not None:
                self.leave(anchor)

    def _settle(self, numbers: list[int]) -> None:
        """Tails enter the tree, with the candidates before their ends."""
        who = np.array(numbers, np.int64)
        counts = self.count[who]
        for number, n in zip(numbers, counts.tolist(), strict=True):
            self._enter(number, n)
        for array in (self.tokens, self.slots, self.stamps):
            array[who, 0] = array[who, counts]
        self.tokens[who, 1:] = self.slots[who, 1:] = -1
        self.stamps[who, 1:] = NEVER
        self.count[who] = 0

    def _enter(self, number: int, n: int) -> None:
        """What the rider added to its leaf, n tokens, is the leaf's."""
        tree, anchor = self._tree, self.anchors[number]
        assert anchor is not None
        node = anchor.node
        node.stamp = max(node.stamp, int(self.used[number]))
        if n:
            tree.operations += 1
            arrays = (self.stamps, self.tokens, self.slots)
            blocks = TailBlocks(node.end, *(array[number, :n] for array in arrays))
            node.tokens.extend(self.tail[number, 1 : n + 1])
            node.slots.extend(self.tail_slots[number, 1 : n + 1])
            if blocks.is_empty:
                node.blocks += [None] * n
            else:
                node.blocks[-1:] = [*[blocks] * n, None]
                tree.push_block(blocks)
        anchor.depth, anchor.epoch = node.end, node.epoch

    # A step.

    def steps(
        self, numbers: Sequence[int], tips: Sequence[tuple[int, int, int]], skip_token: int
    ) -> tuple[NDArray[np.bool_], Steps]:
        """Which of these riders went on by one of their last candidates, bool [n], and how all
        would; tips: length, last token and version of their handles. Changes nothing."""
        who = np.array(numbers, np.int64)
        lengths, tokens, versions = np.array(tips, np.int64).T
        same = self.tokens[who, self.count[who]] == tokens[:, None]
        ok = same.any(1)
        # Of a token that is none, padding is not the candidate.
        ok &= tokens >= 0
        ok &= lengths == self.ends[who] + 1
        ok &= versions == self.versions[who]
        ok &= self.skip_tokens[who] == skip_token
        return ok, Steps(who, tokens, same.argmax(1))

    def advance(self, steps: Steps) -> Ints:
        """The riders go on, pinned; gives the slots of their new tokens, int64 [n]."""
        who, tokens, columns = steps
        at = self.count[who]
        slots = self.slots[who, at, columns]
        self.tokens[who, at, columns] = self.slots[who, at, columns] = -1
        at += 1
        self.count[who] = at
        self.tail[who, at], self.tail_slots[who, at] = tokens, slots
        self.ends[who] += 1
        self.used[who] = self._tree.clock
        self._tree.operations += len(who)
        return slots

    def score(self, who: Ints, candidates: Ints, slots: Ints, *, padded: bool) -> None:
        """Candidates, int64 [n, k] padded with -1, with their slots, where the riders stand.

        padded: some are padding.
        """
        at, k = self.count[who], candidates.shape[1]
        self._widen(k)
        self.tokens[who, at, :k], self.slots[who, at, :k] = candidates, slots
        clock = self._tree.clock
        self.stamps[who, at] = np.where((slots >= 0).any(1), clock, NEVER) if padded else clock

    def settle_some(self, who: Ints) -> None:
        """Lets tails enter the tree that are long: an eighth of the riders, and what is full."""
        counts = self.count[who]
        long = who[counts >= _SETTLES]
        if not len(long):
            return
        most = -(-len(who) // 8)
        full = who[counts == TAIL - 1]
        self._settle(list(dict.fromkeys([*full.tolist(), *long[:most].tolist()])))

    # What they own.

    def last_used(self, node: "Node") -> int:
        """The batch in which a node's rider was last placed; 0 where it has none."""
        return 0 if node.rider is None else int(self.used[node.rider.number])

    def oldest(self) -> int:
        """The batch whose candidates are the oldest."""
        return int(self.stamps.min()) if len(self) else NEVER

    def evict(self, stamp: int, slots: int) -> Ints:
        """Drops candidates of a batch, of rider after rider until `slots` are free; gives those."""
        who, at = (self.stamps == stamp).nonzero()
        held = self.slots[who, at]
        enough = int(np.searchsorted((held >= 0).sum(1).cumsum(), slots)) + 1
        who, at, held = who[:enough], at[:enough], held[:enough]
        self._drop(who, at)
        return held[held >= 0]

    def drop_candidates(self) -> Ints:
        """Drops all candidates; gives their slots."""
        held = self.slots[self.slots >= 0]
        self._drop(*(self.stamps != NEVER).nonzero())
        return held

    def _drop(self, who: Ints, at: Ints) -> None:
        self.tokens[who, at] = self.slots[who, at] = -1
        self.stamps[who, at] = NEVER

    def owned(self) -> list[Ints]:
        """The slots of their tails and candidates."""
        tails = (np.arange(TAIL) > 0) & (np.arange(TAIL) <= self.count[:, None])
        live = np.array([anchor is not None for anchor in self.anchors], bool)
        return [self.tail_slots[tails & live[:, None]], self.slots[self.slots >= 0]]

    @property
    def pinned(self) -> int:
        """Riders that the batch in progress holds."""
        live = [anchor is not None for anchor in self.anchors]
        return int((self.used[live] == self._tree.clock).sum()) if live else 0
