"""CUDA graphs of the steady-state packed forward: one launch where a trunk has a thousand.

A graph has static buffers for a bucket of tokens, of rows and of prefix lengths; a step's batch is
copied in and the rest is padding: position -1, which attention leaves out, and the pool's last
slot, which is nobody's. Shapes beyond the buckets run as they are.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from guided_decode.kernels.jit import next_power_of_two
from guided_decode.packed import PackedBatch
from guided_decode.packed_model import MOST_GRAPH_TOKENS, PackedModel

logger = logging.getLogger("guided_decode")

# Tokens of a forward, by bucket; a longer one is bound by arithmetic, not by launches.
TOKEN_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MOST_GRAPH_TOKENS)
# Tokens of one row: a longer catch-up is rare.
MOST_QUERIES = 64
_SHORTEST_PREFIX = 512
# The graphs that are kept: each holds little, its buffers are in a pool that all share.
_MOST_GRAPHS = 64


class Bucket(NamedTuple):
    """What a graph was captured for: upper bounds, all but `table`."""

    tokens: int
    rows: int
    queries: int
    prefix: int
    table: tuple[int, int]


class _Graph(NamedTuple):
    batch: PackedBatch
    replay: Callable[[], None]


def bucket_of(batch: PackedBatch) -> Bucket | None:
    """The bucket that takes the batch, or None where it runs as it is."""
    tokens = next((n for n in TOKEN_BUCKETS if n >= len(batch.token_ids)), None)
    if tokens is None or batch.segment_table is None or batch.most_queries > MOST_QUERIES:
        return None
    return Bucket(
        tokens,
        next_power_of_two(len(batch.segment_table)),
        next_power_of_two(batch.most_queries),
        next_power_of_two(max(batch.most_positions, _SHORTEST_PREFIX)),
        # A table that grew lies elsewhere.
        (batch.table.data_ptr(), batch.table.shape[1]),
    )


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
        self._memory: Any = None
        self._works = True
        self.replays = 0
        self.captures = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, batch: PackedBatch) -> bool:
        """Runs the batch, if a bucket takes it; False where the caller has to run it."""
        bucket = bucket_of(batch) if self._works else None
        if bucket is None:
            return False
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._add(bucket, batch)
            if graph is None:
                return False
        self._graphs.move_to_end(bucket)
        self._fill(graph.batch, batch)
        graph.replay()
        self.replays += 1
        return True

    def _add(self, bucket: Bucket, batch: PackedBatch) -> _Graph | None:
        for old in [b for b in self._graphs if b.table != bucket.table]:
            del self._graphs[old]
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        static = self._static(bucket, batch)
        try:
            replay = self._record(static) if self._capture else lambda: self._run(static)
        except (RuntimeError, NotImplementedError) as error:
            # A model whose forward cannot be captured runs as it is, from now on.
            logger.warning("CUDA graphs are off: the forward cannot be captured (%s)", error)
            self._works = False
            self._graphs.clear()
            return None
        self.captures += 1
        self._graphs[bucket] = _Graph(static, replay)
        return self._graphs[bucket]

    def _static(self, bucket: Bucket, batch: PackedBatch) -> PackedBatch:
        """Buffers of the bucket's size, all padding."""
        made = batch.token_ids.new_empty
        static = replace(
            batch,
            token_ids=made(bucket.tokens),
            positions=made(bucket.tokens),
            slots=made(bucket.tokens),
            segments=[],
            segment_table=torch.zeros(
                bucket.rows, 3, dtype=torch.int32, device=batch.token_ids.device
            ),
            most_queries=bucket.queries,
            most_positions=bucket.prefix,
            stretches={},
        )
        self._blank(static)
        return static

    def _blank(self, static: PackedBatch) -> None:
        assert static.segment_table is not None
        static.token_ids.zero_()
        static.positions.fill_(-1)
        static.slots.fill_(self._spare_slot)
        static.segment_table.zero_()

    def _fill(self, static: PackedBatch, batch: PackedBatch) -> None:
        assert static.segment_table is not None
        assert batch.segment_table is not None
        n = len(batch.token_ids)
        self._blank(static)
        static.token_ids[:n] = batch.token_ids
        static.positions[:n] = batch.positions
        static.slots[:n] = batch.slots
        static.segment_table[: len(batch.segment_table)] = batch.segment_table

    def _run(self, static: PackedBatch) -> None:
        self._forward(static)

    def _record(self, static: PackedBatch) -> Callable[[], None]:
        """Captures the forward of the static batch."""
        if not self._graphs:
            # torch refuses to capture into a memory pool whose graphs are all gone.
            self._memory = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Kernels are compiled and libraries get their workspaces before the capture.
            for _ in range(2):
                self._forward(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._forward(static)
        return graph.replay
