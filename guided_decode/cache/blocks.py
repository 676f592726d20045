"""Candidates that were scored after positions of the tree, and were not chosen."""

import numpy as np

from guided_decode.growable import Ints

NO_INTS: Ints = np.empty(0, np.int64)
# When candidates were scored where there are none.
NEVER = np.iinfo(np.int64).max


class Block:
    """Those after one position: tokens and slots, int64 [n]; none when they are evicted.

    stamp: the batch that used them last.
    """

    __slots__ = ("slots", "stamp", "tokens")

    def __init__(self, stamp: int, tokens: Ints = NO_INTS, slots: Ints = NO_INTS) -> None:
        self.tokens = tokens
        self.slots = slots
        self.stamp = stamp

    @property
    def is_empty(self) -> bool:
        return not len(self.tokens)

    def free_all(self) -> Ints:
        """Lets go of them; gives their slots."""
        freed = self.slots
        self.tokens = self.slots = NO_INTS
        return freed

    def free_oldest(self) -> Ints:
        """Lets go of those that were used longest ago; gives their slots."""
        return self.free_all()

    def free_at(self, depth: int) -> Ints:
        """Lets go of those after a position; gives their slots."""
        return self.free_all()


class TailBlocks:
    """Those after neighbouring positions, which came together and are kept so until one is read:
    few ever are.

    Of the position at depth `first` + p: stamps[p], and tokens and slots [p], int64 [n, width], -1
    where there is none; they are copied. Later positions were used later.
    """

    __slots__ = ("_at", "_slots", "_stamps", "_tokens", "first")

    def __init__(self, first: int, stamps: Ints, tokens: Ints, slots: Ints) -> None:
        self.first = first
        held = slots >= 0
        # Riders have room for the widest of them.
        width = held.any(0)
        self._tokens, self._slots = tokens[:, width], slots[:, width]
        self._stamps: list[int] = np.where(held.any(1), stamps, NEVER).tolist()
        # The first position that has any.
        self._at = 0
        self._go_on()

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._stamps)

    @property
    def stamp(self) -> int:
        """The batch that used the oldest last; there are some."""
        return self._stamps[self._at]

    @property
    def slots(self) -> Ints:
        """The slots of all, int64 [n]."""
        return self._slots[self._slots >= 0]

    def take(self, depth: int) -> Block | None:
        """Those after a position, which from now on are on their own; None where there are none."""
        p = depth - self.first
        stamp = self._stamps[p]
        if stamp == NEVER:
            return None
        held = self._slots[p] >= 0
        block = Block(stamp, self._tokens[p, held], self._slots[p, held])
        self._drop(p)
        return block

    def free_at(self, depth: int) -> Ints:
        """As `Block`."""
        block = self.take(depth)
        return NO_INTS if block is None else block.slots

    def free_oldest(self) -> Ints:
        """As `Block`."""
        return self.free_at(self.first + self._at)

    def free_all(self) -> Ints:
        """As `Block`."""
        freed = self.slots
        self._stamps = [NEVER] * len(self._stamps)
        self._go_on()
        return freed

    def _drop(self, p: int) -> None:
        self._slots[p] = -1
        self._stamps[p] = NEVER
        self._go_on()

    def _go_on(self) -> None:
        while self._at < len(self._stamps) and self._stamps[self._at] == NEVER:
            self._at += 1
        if self.is_empty:
            # Positions go on to hold on to them.
            self._tokens = self._slots = NO_INTS
