"""CUDA graphs of a causal LM's steps, in which each row reads the logits of its last token."""

import torch
from torch import Tensor

from guided_decode.cache.one_process import OneProcess
from guided_decode.forward.graphs import GraphedForward, usual_shapes
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel

# Rows of a step whose logits the buffer holds: 33 MB where a vocabulary has 128k tokens.
MOST_ROWS = 64


class GraphedLogits(OneProcess):
    """Replays the forwards of batches whose every row ends in a token that is read."""

    def __init__(self, model: PackedModel, *, capture: bool = True) -> None:
        """capture: as of `GraphedForward`."""
        self._model = model
        self._buffer: Tensor | None = None
        self._followed = model.changes
        self.graphs = GraphedForward(model, self._write, capture=capture)

    def follow(self) -> None:
        """Forgets what was captured of other weights."""
        if self._followed != self._model.changes:
            self.graphs.forget()
            self._followed = self._model.changes

    def prepare(self, rows: int, prefix: int) -> None:
        """Captures the steps of at most so many rows, with prefixes of at most so many tokens."""
        shapes = usual_shapes(min(rows, MOST_ROWS), 1, prefix)
        cache = self._model.cache
        self.graphs.prepare(shapes, cache.tables.table, cache.pool)

    def run(self, batch: PackedBatch) -> Tensor | None:
        """Logits after each row's last token, float32 [rows, vocab]; None where the caller has to
        run the batch."""
        rows = len(batch.segments)
        if rows > MOST_ROWS or not self.graphs.run(batch):
            return None
        assert self._buffer is not None
        # The next batch writes there too.
        return self._buffer[:rows].clone()

    def _write(self, batch: PackedBatch) -> None:
        """The work of a graph; padding reads the first token."""
        if self._buffer is None:
            self._buffer = torch.empty(
                MOST_ROWS, self._model.vocab_size, dtype=torch.float32, device=batch.stacked.device
            )
        assert batch.segment_table is not None
        start, queries, _ = batch.segment_table.unbind(1)
        last = (start + queries - 1).clamp(min=0).long()
        self._buffer[: len(last)].copy_(self._model.forward(batch, last))
