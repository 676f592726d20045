"""Where the heads of models in memory are read again, when those have changed."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from guided_decode.checkpoints.families import Family
from guided_decode.checkpoints.head import Head, read_head
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.trunk_head_loading import HeadLike
from guided_decode.forward.weights import Origin
from guided_decode.scoring.critic import ValueHead
from guided_decode.scoring.transforms import Transform
from guided_decode.scoring.trunk_head import TrunkHead


def critic_head_origin(
    source: Source,
    family: Family,
    transform: Transform,
    own_head: Callable[[Source], Head] | None = None,
) -> Origin | None:
    """The head of a critic in memory, which is watched with its trunk; None for files.

    own_head: as of `checkpoint.load_checkpoint`.
    """
    memory = source.memory
    if memory is None:
        return None

    def read(trunk: PreTrainedModel) -> ValueHead:
        now = memory.source()
        head = read_head(now, family, transform) if own_head is None else own_head(now)
        bias = None if head.bias is None else head.bias.to(trunk.device)
        inner = None if head.inner is None else head.inner.to(trunk.device)
        return ValueHead(head.weight.to(trunk.device), bias, transform, inner)

    return Origin((), read)


def trunk_head_origin(head: HeadLike, read: Callable[[PreTrainedModel], TrunkHead]) -> Origin:
    """The head on a policy's trunk: `read` gives it, with the final norm of that trunk."""
    watched: list[nn.Module | Tensor] = []
    if isinstance(head, nn.Module):
        watched = [head]
    elif isinstance(head, Mapping):
        watched = list(head.values())
    elif isinstance(head, TrunkHead):
        inner = () if head.inner is None else (head.inner.weight, head.inner.bias)
        watched = [each for each in (head.weight, head.bias, *inner) if each is not None]
    return Origin(tuple(watched), read)
