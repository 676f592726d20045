"""Nodes of the radix tree."""

from guided_decode.cache.anchor import Anchor
from guided_decode.cache.blocks import Block, TailBlocks
from guided_decode.growable import GrowableInts, Ints


class Node:
    """A run of tokens below a parent: tokens[i] is the prefix's token start + i."""

    __slots__ = (
        "blocks", "child_slots", "child_tokens", "children", "children_stamp", "epoch",
        "parent", "rider", "slots", "stamp", "start", "tokens",
    )  # fmt: skip

    def __init__(self, parent: "Node | None", start: int, tokens: Ints, slots: Ints) -> None:
        self.parent = parent
        self.start = start
        self.tokens = GrowableInts(tokens)
        self.slots = GrowableInts(slots)
        # blocks[i] holds the candidates after token start + i; neighbours may share theirs.
        self.blocks: list[Block | TailBlocks | None] = [None] * len(tokens)
        self.children: dict[int, Node] = {}
        self.child_tokens = GrowableInts()
        self.child_slots = GrowableInts()
        self.stamp = 0
        # When children were last read as candidates: a time for all of them, for O(1) work.
        self.children_stamp = 0
        # Grows whenever tokens leave the node, so that a remembered position can be checked.
        self.epoch = 0
        # Who goes on from the end of this leaf, beside the tree.
        self.rider: Anchor | None = None

    @property
    def end(self) -> int:
        return self.start + self.tokens.length

    @property
    def last_used(self) -> int:
        """The batch that last read a token of the node."""
        return self.stamp if self.parent is None else max(self.stamp, self.parent.children_stamp)
