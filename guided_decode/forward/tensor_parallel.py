"""What a forward of a model that transformers has sharded does between its ranks."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

# Styles of transformers' plans whose collectives in a forward are known: none, or one sum over the
# ranks of what a row-wise layer gives, or (since 5.24) an embedding by rows of the vocabulary.
_SUMMED = {"rowwise": 0, "embedding_rowwise": 1}  # and which dimension of its weight is the sum's
_SILENT = frozenset({"colwise", "replicated_with_grad_allreduce"})
_GATHERED_HEAD = frozenset({"colwise_gather_output", "colwise_rep"})


def shard_mesh(model: PreTrainedModel) -> Any:
    """The mesh of devices over which a model's weights are sharded; None where they are whole.

    Raises ValueError: they are sharded in another way than by tensor parallelism.
    """
    meshes = {
        mesh
        for weight in model.parameters()
        if (mesh := getattr(weight, "device_mesh", None)) is not None
    }
    if not meshes:
        return None
    names = {name for mesh in meshes for name in mesh.mesh_dim_names or ("tp",)}
    if len(meshes) > 1 or names != {"tp"}:
        raise ValueError(
            f"{type(model).__name__} is sharded over {', '.join(sorted(names))}: expected weights "
            'that are whole, or sharded by tensor parallelism alone (tp_plan="auto")'
        )
    return meshes.pop()


def least_of_ranks(number: int, mesh: Any, device: torch.device) -> int:
    """The least of the numbers that the ranks of a mesh have; all of them ask together."""
    least = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.get_group())
    return int(least)


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives of one forward, so that a rank whose forward failed can take part in them.

    group: of the model's mesh. sums: how many sums of [1, tokens, hidden] come first; None where
    the plan has collectives that are not known here. hidden, dtype: of these. head: the output
    embeddings, where their logits are gathered at the end.
    """

    group: Any
    sums: int | None
    hidden: int
    dtype: torch.dtype
    head: Any = None

    @property
    def passed(self) -> int:
        """How many collectives this rank has begun, ever."""
        return int(self.group._get_sequence_number_for_group())

    def catch_up(self, since: int, tokens: int, read: Tensor | None, device: torch.device) -> None:
        """Takes part, with zeros, in what is left of a forward that began at `since`.

        So the others end theirs, whose result nobody uses, and all stay in step.
        """
        if self.sums is None:
            return
        shape = (1, tokens, self.hidden)
        for _ in range(self.sums - (self.passed - since)):
            dist.all_reduce(torch.zeros(shape, dtype=self.dtype, device=device), group=self.group)
        if self.head is not None and read is not None and self.passed - since == self.sums:
            self.head(torch.zeros(1, len(read), self.hidden, dtype=self.dtype, device=device))


def collectives_of(model: PreTrainedModel, mesh: Any) -> Collectives:
    """What transformers' plan makes a forward of this model do."""
    hidden = model.config.get_text_config().hidden_size
    of_unknown = Collectives(mesh.get_group(), None, hidden, model.dtype)
    # A trunk's own plan; a language model has its head's beside it.
    plan = dict(getattr(model, "tp_plan", None) or {})
    head = None
    with contextlib.suppress(KeyError):
        if plan["lm_head"] in _GATHERED_HEAD:
            del plan["lm_head"]
            head = model.get_output_embeddings()
    if not plan or set(plan.values()) - _SILENT - set(_SUMMED):
        return of_unknown
    summing = {name: _SUMMED[style] for name, style in plan.items() if style in _SUMMED}
    named = [
        (".".join("*" if part.isdigit() else part for part in name.split(".")), module)
        for name, module in model.named_modules()
    ]
    sizes = [module.weight.shape[summing[name]] for name, module in named if name in summing]
    if set(sizes) != {hidden}:
        return of_unknown
    return Collectives(mesh.get_group(), len(sizes), hidden, model.dtype, head)
