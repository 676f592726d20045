"""Which decoder layers are merged: those that give what they gave, on a batch tried at load."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from guided_decode.cache.prefix_cache import PrefixCache
from guided_decode.forward.layer_parts import parts_of
from guided_decode.forward.merged_layers import MergedLayer, switch
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import How, PackedBatch, pack

if TYPE_CHECKING:
    from guided_decode.forward.packed_model import PackedModel

# Largest difference relative to the norm of what a layer gave: sums in another order.
_ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_PREFIX, _CANDIDATES = 6, 2


class _Heard(NamedTuple):
    """A layer's call in the trial."""

    layer: nn.Module
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]
    output: Tensor


@without_autograd
def merge_layers(model: "PackedModel") -> int:
    """Merges the layers of a model where that gives the same; returns how many.

    Each is compared with the module that it stands for, on its own input in a forward of a few
    tokens: what it gives, and the keys and values that it leaves. One that differs, in whatever
    way, stays as it is, and so does a model whose forward fails, of which `check_packed` speaks.
    """
    if model.model.dtype not in _ALLOWED or model.mesh is not None:
        return 0
    batch = _trial_batch(model)
    try:
        heard, hows = _listen(model, batch)
    except (TypeError, AttributeError, RuntimeError, IndexError, ValueError):
        return 0
    before: MergedLayer | None = None
    count = 0
    for call in heard:
        merged = _merged(call, hows, batch, owned=model.origin is None)
        if merged is not None:
            switch(call.layer, merged)
            count += 1
            if before is not None and _lie_together(before, merged):
                before.follower = merged
        before = merged
    return count


def _listen(model: "PackedModel", batch: PackedBatch) -> tuple[list[_Heard], dict[int, How]]:
    """The layers' calls in one forward, in their order, and how each asked for attention."""
    heard: list[_Heard] = []

    def hear(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        rotation = kwargs.get("position_embeddings")
        if len(args) == 1 and rotation is not None and isinstance(output, Tensor):
            heard.append(_Heard(layer, args[0], rotation, output))

    handles = [
        module.register_forward_hook(hear, with_kwargs=True)
        for module in model.model.modules()
        if hasattr(module, "self_attn")
    ]
    try:
        is_lm = model.model.get_output_embeddings() is not None
        model.run(batch, torch.zeros(1, dtype=torch.int64, device=model.device) if is_lm else None)
    finally:
        for handle in handles:
            handle.remove()
    assert batch.heard is not None
    return heard, batch.heard


def _merged(
    call: _Heard, hows: dict[int, How], batch: PackedBatch, *, owned: bool
) -> MergedLayer | None:
    parts = parts_of(call.layer, owned=owned)
    if parts is None or parts.layer not in hows:
        return None
    merged = MergedLayer(parts, hows[parts.layer])
    wanted = [call.output, *_written(parts.layer, batch)]
    try:
        given = [merged(call.hidden, call.rotation, batch), *_written(parts.layer, batch)]
    except (TypeError, AttributeError, RuntimeError, IndexError, ValueError):
        return None
    same = all(_are_close(a, b) for a, b in zip(given, wanted, strict=True))
    return merged if same else None


def _written(layer: int, batch: PackedBatch) -> list[Tensor]:
    """The batch's keys and values of a layer."""
    pool = batch.pool
    both = (pool.keys[layer], pool.layer_values[layer])
    return [each[batch.slots.to(each.device)] for each in both]


def _are_close(given: Tensor, wanted: Tensor) -> bool:
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    differs = (given.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)
    return float(differs) <= _ALLOWED[wanted.dtype]


def _lie_together(before: MergedLayer, merged: MergedLayer) -> bool:
    """Whether two layers lie on one device."""
    places = {each.parts.norms.attention.norm.weight.device for each in (before, merged)}
    return len(places) == 1


def _trial_batch(model: "PackedModel") -> PackedBatch:
    """A row's prefix and candidates in a pool of their own."""
    length = max(1, min(_PREFIX, (model.max_positions or _PREFIX + 2) - 2))
    cache = PrefixCache(model.cache.pool.like(length + _CANDIDATES))
    ids = np.random.default_rng(0).integers(0, model.vocab_size, length + _CANDIDATES)
    cache.begin_batch()
    placement = cache.place(ids[:length], 0, np.unique(ids[length:]))
    assert placement is not None
    cache.write_tables()
    table = cache.tables.table
    (batch,) = pack([placement.work], table, cache.pool, 1 << 20, fused=model.fused)
    return replace(batch, heard={})
