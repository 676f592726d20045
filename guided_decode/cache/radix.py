"""A radix tree over token ids whose nodes own slots of a pool.

A position in the tree is (node, depth): the first `depth` tokens of a prefix, the last of which
lies in `node` (node.start < depth <= node.end), or (root, 0). Candidates that were scored after
a position hang on it as one block, an array of tokens with their slots; the one that is chosen
moves from its block into the tree with its slot.

What the current batch touched (`stamp == clock`) is pinned: it is never evicted. Unchosen
candidates are evicted before any prefix, then ends of prefixes that were taken back (drafts that
were rejected), then prefixes by least recent use and from their ends.

Beside the tree go its `riders`; a look-up that comes to where one of them goes on finds it here.
"""

import heapq
from itertools import count

import numpy as np

from guided_decode.cache.blocks import NO_INTS, Block, TailBlocks
from guided_decode.cache.pool import SlotPool
from guided_decode.cache.radix_node import Node
from guided_decode.cache.riders import Riders
from guided_decode.growable import GrowableInts, Ints


class RadixTree:
    """The tree over one pool. `operations` counts node operations, the unit of host work."""

    def __init__(self, pool: SlotPool) -> None:
        self.pool = pool
        self.clock = 1
        self.operations = 0
        self.evicted = 0
        self.generation = 0
        self._order = count()
        self.riders = Riders(self)
        self.clear()

    def take_evicted(self) -> int:
        """How many slots were evicted since this was last asked."""
        evicted, self.evicted = self.evicted, 0
        return evicted

    def clear(self) -> None:
        """Forgets everything; positions that were remembered are no longer valid."""
        self.generation += 1
        self.root = Node(None, 0, NO_INTS, NO_INTS)
        self._leaves: list[tuple[int, int, Node]] = []
        self._blocks: list[tuple[int, int, Block | TailBlocks]] = []
        self.riders.clear()
        self.pool.reset()

    def begin_batch(self) -> None:
        """Unpins what the last batch touched."""
        self.clock += 1

    def match(self, tokens: Ints, node: Node, depth: int) -> tuple[Node, int, list[Ints]]:
        """Walks from a position of this prefix as far as the tree knows it.

        A candidate that was chosen since is taken into the tree on the way. Returns the
        deepest position, and the slots of the tokens from `depth` to there.
        """
        slots: list[Ints] = []
        while depth <= node.start and node.parent is not None:
            node = node.parent
        while True:
            self.operations += 1
            if depth < node.end:
                at = depth - node.start
                known = node.tokens.view[at:]
                asked = tokens[depth : depth + len(known)]
                same = _common(known, asked)
                slots.append(node.slots.view[at : at + same])
                depth += same
            if node.rider is not None and depth == node.end:
                self.riders.leave(node.rider)
                continue
            if depth == len(tokens):
                break
            token = int(tokens[depth])
            child = node.children.get(token) if depth == node.end else None
            if child is None:
                promoted = self._promote(node, depth, token)
                if promoted is None:
                    break
                node, slot = promoted
                slots.append(slot)
                depth += 1
            else:
                node = child
        node.stamp = self.clock
        return node, depth, slots

    def insert(self, node: Node, depth: int, tokens: Ints, slots: Ints) -> Node:
        """Adds tokens with their slots after a position; returns the node of the last one."""
        self.operations += 1
        if depth < node.end:
            node = self._split(node, depth)
        if node is not self.root and not node.children:
            node.tokens.extend(tokens)
            node.slots.extend(slots)
            node.blocks.extend([None] * len(tokens))
            node.stamp = self.clock
            return node
        child = Node(node, depth, tokens, slots)
        child.stamp = self.clock
        node.children[int(tokens[0])] = child
        node.child_tokens.extend(tokens[:1])
        node.child_slots.extend(slots[:1])
        self._push_leaf(child)
        return child

    def candidate_slots(self, node: Node, depth: int, candidates: Ints) -> Ints:
        """Slots of distinct candidates after a position, int64 [k]; -1 where not cached."""
        self.operations += 1
        slots = np.full(len(candidates), -1, np.int64)
        block = self.block_at(node, depth)
        if block is not None:
            block.stamp = self.clock
            _look_up(candidates, block.tokens, block.slots, slots)
        if depth < node.end:
            at = depth - node.start
            _look_up(candidates, node.tokens.view[at : at + 1], node.slots.view[at : at + 1], slots)
        elif node.child_tokens.length:
            node.children_stamp = self.clock
            _look_up(candidates, node.child_tokens.view, node.child_slots.view, slots)
        return slots

    def add_candidates(self, node: Node, depth: int, tokens: Ints, slots: Ints) -> None:
        """Hangs scored candidates, not yet cached, on a position."""
        self.operations += 1
        block = self.block_at(node, depth)
        if block is None or block.is_empty:
            block = Block(self.clock)
            node.blocks[depth - node.start - 1] = block
            self.push_block(block)
        block.stamp = self.clock
        if not block.is_empty:
            tokens = np.concatenate([block.tokens, tokens])
            slots = np.concatenate([block.slots, slots])
        block.tokens, block.slots = tokens, slots

    def make_room(self, slots: int) -> bool:
        """Evicts until `slots` slots are free; False where what is not pinned is too little."""
        while self.pool.free_slots < slots and self._evict_candidates(slots):
            pass
        while self.pool.free_slots < slots and self._evict_leaf(slots - self.pool.free_slots):
            pass
        return self.pool.free_slots >= slots

    def give_up(self, node: Node, depth: int) -> None:
        """A prefix no longer ends in this node, but at `depth` on the way to it: what is behind
        goes before any other prefix, where no other row is read there."""
        if node.start >= depth and not node.children and node.last_used < self.clock:
            node.stamp = 0
            self._push_leaf(node)

    def drop_candidates(self) -> None:
        """Frees every scored candidate that was not chosen: nobody will ask for them."""
        # Nobody who was found to ride on one does so now.
        self.clock += 1
        for _, _, block in self._blocks:
            self.pool.give_back(block.free_all())
        self.pool.give_back(self.riders.drop_candidates())
        self.operations += len(self._blocks)
        self._blocks.clear()

    def _promote(self, node: Node, depth: int, token: int) -> tuple[Node, Ints] | None:
        """Moves a scored candidate into the tree; None where it was not scored."""
        if depth == 0:
            return None
        block = self.block_at(node, depth)
        if block is None:
            return None
        others = block.tokens != token
        at = int(others.argmin()) if len(others) else 0
        if not len(others) or others[at]:
            return None
        slot = block.slots[at : at + 1]
        block.tokens, block.slots = block.tokens[others], block.slots[others]
        return self.insert(node, depth, np.array([token], np.int64), slot), slot

    def _split(self, node: Node, depth: int) -> Node:
        """Cuts a node in two at `depth`; the object keeps the lower part. Returns the upper."""
        at, parent = depth - node.start, node.parent
        assert parent is not None
        upper = Node(parent, node.start, node.tokens.view[:at], node.slots.view[:at])
        upper.blocks, node.blocks = node.blocks[:at], node.blocks[at:]
        upper.stamp = node.stamp
        parent.children[int(upper.tokens.view[0])] = upper
        node.tokens = GrowableInts(node.tokens.view[at:])
        node.slots = GrowableInts(node.slots.view[at:])
        node.start, node.parent = depth, upper
        upper.children[int(node.tokens.view[0])] = node
        upper.child_tokens.extend(node.tokens.view[:1])
        upper.child_slots.extend(node.slots.view[:1])
        return upper

    def _evict_candidates(self, slots: int) -> bool:
        """Frees the candidates that were used longest ago; False where all are pinned."""
        oldest = self.riders.oldest()
        if oldest < self.clock and (not self._blocks or oldest <= self._blocks[0][0]):
            self._evict_of_riders(oldest, slots)
            return True
        if self._evict_block():
            return True
        if oldest < self.clock:
            self._evict_of_riders(oldest, slots)
        return oldest < self.clock

    def _evict_of_riders(self, stamp: int, slots: int) -> None:
        self._evict(self.riders.evict(stamp, slots - self.pool.free_slots))

    def _evict_block(self) -> bool:
        """Frees the block that was used longest ago; False where all are pinned."""
        while self._blocks:
            stamp, _, block = heapq.heappop(self._blocks)
            if block.is_empty:
                continue
            if stamp == block.stamp < self.clock:
                self._evict(block.free_oldest())
                if not block.is_empty:
                    self.push_block(block)
                return True
            self.push_block(block)
            # The oldest is of this batch, and so are all others.
            if stamp == self.clock:
                return False
        return False

    def _evict_leaf(self, slots: int) -> bool:
        """Drops up to `slots` tokens from the end of the leaf that was used longest ago."""
        while self._leaves:
            stamp, _, node = heapq.heappop(self._leaves)
            if node.children or not node.tokens.length:
                continue
            if stamp == self._last_used(node) < self.clock:
                if node.rider is not None:
                    self.riders.leave(node.rider)
                self._shorten(node, max(0, node.tokens.length - slots))
                return True
            self._push_leaf(node)
            if stamp == self.clock:
                return False
        return False

    def _shorten(self, node: Node, length: int) -> None:
        self.operations += 1
        for depth, block in enumerate(node.blocks[length:], node.start + length + 1):
            if block is not None:
                self._evict(block.free_at(depth))
        del node.blocks[length:]
        first = int(node.tokens.view[0])
        node.tokens.truncate(length)
        freed = node.slots.truncate(length)
        node.epoch += 1
        self.pool.give_back(freed)
        self.evicted += len(freed)
        if length:
            self._push_leaf(node)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[first]
        keep = parent.child_tokens.view != first
        parent.child_tokens = GrowableInts(parent.child_tokens.view[keep])
        parent.child_slots = GrowableInts(parent.child_slots.view[keep])
        parent.stamp = max(parent.stamp, node.last_used)
        if not parent.children and parent is not self.root:
            self._push_leaf(parent)

    def _evict(self, slots: Ints) -> None:
        self.operations += 1
        self.pool.give_back(slots)
        self.evicted += len(slots)

    def block_at(self, node: Node, depth: int) -> Block | None:
        """The candidates after a position of a node, which may be read and written; or None."""
        at = depth - node.start - 1
        block = node.blocks[at]
        if isinstance(block, TailBlocks):
            block = node.blocks[at] = block.take(depth)
            if block is not None:
                self.push_block(block)
        return block

    def push_block(self, block: Block | TailBlocks) -> None:
        """Takes candidates in that may be evicted; they hang on positions."""
        heapq.heappush(self._blocks, (block.stamp, next(self._order), block))
        # Blocks whose every candidate was chosen own nothing and would never be looked at again.
        if len(self._blocks) > 2 * self.pool.capacity + 64:
            self._blocks = [entry for entry in self._blocks if not entry[2].is_empty]
            heapq.heapify(self._blocks)

    def _push_leaf(self, node: Node) -> None:
        heapq.heappush(self._leaves, (self._last_used(node), next(self._order), node))

    def _last_used(self, node: Node) -> int:
        return max(node.last_used, self.riders.last_used(node))

    def owned(self) -> list[Ints]:
        """The slots of everything, by what has them: nodes, candidates, riders."""
        nodes = self.nodes()
        # Neighbours share theirs.
        blocks = {id(each): each for node in nodes for each in node.blocks if each is not None}
        slots = [node.slots.view for node in nodes] + [each.slots for each in blocks.values()]
        return slots + self.riders.owned()

    def nodes(self) -> list[Node]:
        """Every node but the root, parents first."""
        found, stack = [], [self.root]
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found[1:]


def _common(known: Ints, asked: Ints) -> int:
    """Length of the common beginning; known is at least as long as asked."""
    differ = known[: len(asked)] != asked
    return int(differ.argmax()) if differ.any() else len(asked)


def _look_up(candidates: Ints, tokens: Ints, slots: Ints, found: Ints) -> None:
    """Fills in the slots of the candidates that are among `tokens`."""
    if len(tokens):
        same = candidates[:, None] == tokens[None, :]
        hit = same.any(1)
        found[hit] = slots[same.argmax(1)[hit]]
