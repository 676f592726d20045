"""CUDA graphs of a causal LM's steps, in which each row reads the logits of its last token."""

import torch
from torch import Tensor

from guided_decode.cache.one_process import OneProcess
from guided_decode.forward.activations import LOGIT_BYTES
from guided_decode.forward.graphs import GraphedForward, usual_shapes
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel

# Tokens of a row: prompts, whose shapes hardly come again, run as they are.
_MOST_QUERIES = 4
_MOST_ROWS = 512


class GraphedLogits(OneProcess):
    """Replays the forwards of decoding steps: batches whose every row ends in a token that is read.

    Its logits lie in one buffer, as many rows as `LOGIT_BYTES` hold, 128 of a vocabulary of 128k.
    """

    def __init__(self, model: PackedModel, *, capture: bool = True) -> None:
        """capture: as of `GraphedForward`."""
        self._model = model
        rows = max(1, min(_MOST_ROWS, LOGIT_BYTES // (4 * model.vocab_size)))
        # Graphs are of powers of two.
        self.most_rows = 1 << rows.bit_length() - 1
        self._logits = torch.empty(
            self.most_rows, model.vocab_size, dtype=torch.float32, device=model.device
        )
        self._followed = model.changes
        self.graphs = GraphedForward(model, self._write, capture=capture)

    def follow(self) -> None:
        """Forgets what was captured of other weights."""
        if self._followed != self._model.changes:
            self.graphs.forget()
            self._followed = self._model.changes

    def prepare(self, rows: int, prefix: int) -> None:
        """Captures the steps of at most so many rows, with prefixes of at most so many tokens."""
        shapes = usual_shapes(min(rows, self.most_rows), 1, prefix)
        cache = self._model.cache
        self.graphs.prepare(shapes, cache.tables.table, cache.pool)

    def run(self, batch: PackedBatch) -> Tensor | None:
        """Logits after each row's last token, float32 [rows, vocab], until the next call; None
        where the caller has to run the batch."""
        rows = len(batch.segments)
        if rows > self.most_rows or batch.most_queries > _MOST_QUERIES:
            return None
        return self._logits[:rows] if self.graphs.run(batch) else None

    def _write(self, batch: PackedBatch) -> None:
        """The work of a graph; padding reads the first token."""
        assert batch.segment_table is not None
        start, queries, _ = batch.segment_table.unbind(1)
        last = (start + queries - 1).clamp(min=0).long()
        self._logits[: len(last)].copy_(self._model.forward(batch, last))
