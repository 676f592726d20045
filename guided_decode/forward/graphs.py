"""CUDA graphs of the steady-state packed forward: one launch where a trunk has a thousand.

A graph has static buffers for a bucket of tokens, of rows and of prefix lengths; a step's batch is
copied in and the rest is padding: position -1, which attention leaves out, and the pool's last
slot, which is nobody's. Shapes beyond the buckets run as they are.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_decode.cache.pool import SlotPool
from guided_decode.forward.activations import TOKEN_BUCKETS
from guided_decode.forward.capture import captured, no_waiting
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel
from guided_decode.kernels.jit import next_power_of_two

logger = logging.getLogger("guided_decode")

# Tokens of one row: a longer catch-up is rare.
MOST_QUERIES = 64
_SHORTEST_PREFIX = 512
# The graphs that are kept: each holds little, its buffers are in a pool that all share.
_MOST_GRAPHS = 64


class Shape(NamedTuple):
    """How large a batch is: its tokens and rows, and bounds of a row's tokens and positions."""

    tokens: int
    rows: int
    queries: int
    prefix: int


class Bucket(NamedTuple):
    """What a graph was captured for: upper bounds, all but `table`."""

    tokens: int
    rows: int
    queries: int
    prefix: int
    table: tuple[int, int]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The bounds, which decide how much memory a graph takes."""
        return self[:4]


class _Static(NamedTuple):
    """Buffers that a graph reads, and what is in them where a batch is shorter."""

    batch: PackedBatch
    padding: Tensor
    no_segments: Tensor


class _Graph(NamedTuple):
    static: _Static
    replay: Callable[[], object]


def bucket_of(shape: Shape, table: Tensor, most_tokens: int) -> Bucket | None:
    """The bucket that takes such a batch, or None where it runs as it is."""
    tokens = next((n for n in TOKEN_BUCKETS if n >= shape.tokens), most_tokens + 1)
    if tokens > most_tokens or shape.queries > MOST_QUERIES:
        return None
    return Bucket(
        tokens,
        next_power_of_two(shape.rows),
        next_power_of_two(shape.queries),
        next_power_of_two(max(shape.prefix, _SHORTEST_PREFIX)),
        # A table that grew lies elsewhere.
        (table.data_ptr(), table.shape[1]),
    )


def usual_shapes(rows: int, candidates: int, prefix: int) -> Iterator[Shape]:
    """Steps in which each row forwards its candidates: first those of short prefixes."""
    length = _SHORTEST_PREFIX
    while True:
        for n in range(1, rows + 1):
            yield Shape(n * candidates, n, candidates, length)
        if length >= prefix:
            return
        length *= 2


class GraphedForward:
    """Runs packed forwards by replaying graphs. What the forward writes is all that it gives."""

    def __init__(
        self, model: PackedModel, forward: Callable[[PackedBatch], object], *, capture: bool = True
    ) -> None:
        """
        Args:
            model: whose pool the forward writes to; on a CUDA device.
            forward: the work of one batch, results written to the pool; no host sync inside.
            capture: False runs the padded batch itself instead of a graph of it.
        """
        self._forward = forward
        self._capture = capture
        self._spare_slot = model.cache.pool.capacity
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._device = model.device
        self._most_tokens = model.most_graph_tokens
        self._stream: torch.cuda.Stream | None = None
        self._memory: Any = None
        self._without_room: set[tuple[int, ...]] = set()
        # The reference that runs where no kernel does waits for the device, which ends a capture.
        self.works = model.has_kernel or not capture
        self.replays = 0
        self.captures = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedForward":
        """One without graphs: what was captured writes to the original's pool."""
        copied = object.__new__(GraphedForward)
        memo[id(self)] = copied
        vars(copied).update(vars(self) | {
            "_graphs": OrderedDict(), "_memory": None, "_without_room": set(),
        })  # fmt: skip
        copied._forward = copy.deepcopy(self._forward, memo)
        return copied

    def forget(self) -> None:
        """Drops what was captured: the forward is another one from now on."""
        self._graphs.clear()

    def run(self, batch: PackedBatch) -> bool:
        """Runs the batch, if a bucket takes it; False where the caller has to run it."""
        bucket = None
        if self.works and batch.segment_table is not None:
            shape = Shape(len(batch.token_ids), len(batch.segment_table), batch.most_queries,
                          batch.most_positions)  # fmt: skip
            bucket = bucket_of(shape, batch.table, self._most_tokens)
        if bucket is None or bucket.sizes in self._without_room:
            return False
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._add(bucket, batch.table, batch.pool)
            if graph is None:
                return False
        self._graphs.move_to_end(bucket)
        self._fill(graph.static, batch)
        with self._on_device():
            graph.replay()
        self.replays += 1
        return True

    def prepare(self, shapes: Iterable[Shape], table: Tensor, pool: SlotPool) -> None:
        """Captures the graphs of such batches before one comes, as many as half of those kept."""
        buckets = {bucket_of(shape, table, self._most_tokens): None for shape in shapes}
        wanted = [bucket for bucket in buckets if bucket is not None][: _MOST_GRAPHS // 2]
        # The largest first: the others find room in its memory.
        for bucket in sorted(wanted, reverse=True):
            if self.works and bucket not in self._graphs:
                self._add(bucket, table, pool)

    def _add(self, bucket: Bucket, table: Tensor, pool: SlotPool) -> _Graph | None:
        for old in [b for b in self._graphs if b.table != bucket.table]:
            del self._graphs[old]
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        static = self._static(bucket, table, pool)
        try:
            run = partial(self._forward, static.batch)
            replay = self._record(run) if self._capture else run
        except torch.OutOfMemoryError as error:
            self._without_room.add(bucket.sizes)
            logger.warning("a forward of %d tokens runs without a CUDA graph: %s",
                           bucket.tokens, error)  # fmt: skip
            return None
        except (RuntimeError, NotImplementedError) as error:
            # A model whose forward cannot be captured runs as it is, from now on.
            logger.warning("CUDA graphs are off: the forward cannot be captured (%s)", error)
            self.works = False
            self._graphs.clear()
            return None
        self.captures += 1
        self._graphs[bucket] = _Graph(static, replay)
        return self._graphs[bucket]

    def _static(self, bucket: Bucket, table: Tensor, pool: SlotPool) -> _Static:
        """Buffers of the bucket's size, all padding."""
        device = table.device
        # Token 0 at position -1, in the slot that is nobody's.
        padding = torch.tensor([[0], [-1], [self._spare_slot]]).expand(3, bucket.tokens)
        padding = padding.contiguous().to(device)
        stacked = padding.clone()
        no_segments = torch.zeros(bucket.rows, 3, dtype=torch.int32, device=device)
        token_ids, positions, slots = stacked.unbind()
        batch = PackedBatch(
            stacked,
            token_ids,
            positions,
            slots,
            segments=[],
            table=table,
            pool=pool,
            segment_table=no_segments.clone(),
            most_queries=bucket.queries,
            most_positions=bucket.prefix,
        )
        return _Static(batch, padding, no_segments)

    def _fill(self, static: _Static, batch: PackedBatch) -> None:
        """The batch, and padding behind it, in two launches."""
        segments, into = batch.segment_table, static.batch.segment_table
        assert segments is not None
        assert into is not None
        tokens = [batch.stacked, static.padding[:, len(batch.token_ids) :]]
        torch.cat(tokens, -1, out=static.batch.stacked)
        torch.cat([segments, static.no_segments[len(segments) :]], out=into)

    def _on_device(self) -> AbstractContextManager[object]:
        """The model's device as the current one, on which torch captures and replays."""
        return torch.cuda.device(self._device) if self._capture else nullcontext()

    def _record(self, run: Callable[[], object]) -> Callable[[], object]:
        """Captures a forward.

        Raises RuntimeError: it cannot be captured; then nothing is left of the attempt.
        """
        with self._on_device():
            if not self._graphs:
                # torch refuses to capture into a memory pool whose graphs are all gone.
                self._memory = torch.cuda.graph_pool_handle()
            if self._stream is None:
                # One for all graphs: libraries keep a workspace for each stream that they see.
                self._stream = torch.cuda.Stream(device=self._device)
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            # Its end restores the current stream, also where a capture's own end fails.
            with torch.cuda.stream(self._stream):
                # Kernels are compiled and libraries get their workspaces before the capture.
                run()
                with no_waiting():
                    run()
                graph = captured(run, self._memory, self._stream)
            here.wait_stream(self._stream)
        return graph.replay
