"""Where a handle stood after its last look-up."""

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_decode.cache.radix_node import Node


class Anchor:
    """row: its slot table, filled to `depth`. closes: hands the row back when the handle is gone.

    node, depth: where its prefix ended, if `generation`, `epoch`, `version` and `skip` are still
    what they were. number: its place among the riders, who have gone on since; -1: none.
    """

    __slots__ = (
        "closes", "depth", "epoch", "generation", "node", "number", "row", "skip", "version",
    )  # fmt: skip

    def __init__(self, row: int, node: "Node") -> None:
        self.row = row
        self.closes: weakref.finalize[Any, Any] | None = None
        self.node = node
        self.depth = self.epoch = self.generation = self.version = self.skip = 0
        self.number = -1
