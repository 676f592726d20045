"""One model of a plan: how many weights it has, and what they take."""

from __future__ import annotations

from dataclasses import dataclass

from guided_decode.checkpoints.plan.weight_forms import BF16, WeightForm
from guided_decode.checkpoints.shape import Shape


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model with its sizes.

    name: as commands take it. lm_head: whether its language-model head is loaded. labels: of its
    value head, 0 without one; head_bias: whether that has a bias.
    stored, stored_bytes: how its files are quantised already, and their bytes; None: they are not.
    positions: the longest text that it reads; None: not known.
    kind: of scorer, where the registry or its config says so. inner_weights: of a layer before the
    value head. note: what is odd about its files.
    """

    name: str
    architecture: str
    shape: Shape
    lm_head: bool
    labels: int = 0
    head_bias: bool = False
    stored: str | None = None
    stored_bytes: int | None = None
    positions: int | None = None
    kind: str | None = None
    inner_weights: int = 0
    note: str | None = None

    @property
    def parameters(self) -> int:
        """All weights that are loaded; tied ones once."""
        known = self.shape.parameters(
            lm_head=self.lm_head, labels=self.labels, head_bias=self.head_bias
        )
        return known + self.inner_weights * bool(self.labels)

    def weight_bytes(self, form: WeightForm = BF16, shards: int = 1) -> int:
        """Bytes of the weights on one GPU.

        form: of the matrices of the layers. shards: GPUs over which transformers' own plan cuts
        these and the language-model head; embeddings, norms and the value head are on each.
        """
        if self.stored_bytes is not None:
            return self.stored_bytes
        shape = self.shape
        # A head that is tied to the embeddings shares their copy.
        lm_head = shape.table if self.lm_head and not shape.tied else 0
        on_each = self.parameters - shape.layers * shape.layer_weights - lm_head
        return (form.matrix_bytes(shape) + 2 * lm_head) // shards + 2 * on_each

    def read_bytes(self, form: WeightForm = BF16, shards: int = 1) -> int:
        """Bytes of the weights that any forward reads: all but a table of embeddings."""
        tied = self.lm_head and self.shape.tied
        return self.weight_bytes(form, shards) - (0 if tied else 2 * self.shape.table)

    def kv_bytes(self, shards: int = 1) -> int:
        """Bytes of keys and values of one token on one GPU, in bfloat16."""
        return self.shape.kv_bytes() // shards

    def divides(self, shards: int) -> bool:
        """Whether so many GPUs can each take an equal part of every layer."""
        sizes = (self.shape.heads, self.shape.kv_heads, self.shape.intermediate)
        return all(size % shards == 0 for size in sizes)
