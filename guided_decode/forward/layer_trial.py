"""Which decoder layers are merged: those that give what they gave, on batches tried at load."""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from guided_decode.cache.prefix_cache import PrefixCache
from guided_decode.forward.cpu_linear import is_plain
from guided_decode.forward.layer_parts import GatedFeedForward, Movable, parts_of
from guided_decode.forward.merged_layers import Merged, MergedLayer, switch
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import How, PackedBatch, pack

if TYPE_CHECKING:
    from guided_decode.forward.packed_model import PackedModel

# Largest difference of a token's update, relative to its norm: sums in another order.
_ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_PREFIX, _CANDIDATES = 6, 2
# The last position that is tried of a model that names no most.
_FARTHEST = 1 << 17
# Times the feed-forward's usual input: some bound what they compute.
_SCALES = (1.0, 100.0)
_FAILURES = (TypeError, AttributeError, RuntimeError, IndexError, ValueError, KeyError)


class _Heard(NamedTuple):
    """A layer's call in the trial."""

    layer: nn.Module
    hidden: Tensor
    options: dict[str, Any]
    output: Tensor
    batch: PackedBatch

    @property
    def rotation(self) -> tuple[Tensor, Tensor]:
        rotation: tuple[Tensor, Tensor] = self.options["position_embeddings"]
        return rotation


@without_autograd
def merge_layers(model: "PackedModel") -> int:
    """Merges the layers of a model where that gives the same; returns how many.

    Each is compared with the module that it stands for, on its own input in two forwards of a few
    tokens, at positions far apart and at the first ones: what it adds to each token, and the keys
    and values that it leaves. One that differs, in whatever way, stays as it is, and so does a
    model whose forward fails, of which `check_packed` speaks.
    """
    if model.model.dtype not in _ALLOWED or model.mesh is not None:
        return 0
    try:
        # Far ones first: what a model keeps of the longest sequence is put back by a short one.
        far, near = (_listen(model, far=each) for each in (True, False))
    except _FAILURES:
        return 0
    if [call.layer for call in far] != [call.layer for call in near]:
        return 0
    movable = _movable(model.model) if model.origin is None else frozenset()
    before: MergedLayer | None = None
    count = 0
    for calls in zip(far, near, strict=True):
        merged = _merged(calls, movable)
        if merged is not None:
            switch(calls[0].layer, merged)
            count += 1
            if before is not None and _lie_together(before, merged):
                before.follower = merged
        before = merged
    return count


def join_again(model: nn.Module) -> None:
    """Puts the weights of merged layers side by side that are not, as after a copy."""
    for module in model.modules():
        if isinstance(module, Merged):
            module.merged.join()


def _listen(model: "PackedModel", *, far: bool) -> list[_Heard]:
    """The layers' calls in one forward, in their order."""
    batch = _trial_batch(model)
    heard: list[_Heard] = []

    def hear(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        rotation = kwargs.get("position_embeddings")
        if len(args) == 1 and rotation is not None and isinstance(output, Tensor):
            heard.append(_Heard(layer, args[0], kwargs, output, batch))

    def move(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Attention reads by the batch: only what the modules make of positions is far.
        return args, kwargs | {"position_ids": _spread(model, batch)} if far else kwargs

    handles = [
        module.register_forward_hook(hear, with_kwargs=True)
        for module in model.model.modules()
        if hasattr(module, "self_attn")
    ]
    handles.append(model.model.register_forward_pre_hook(move, with_kwargs=True))
    try:
        is_lm = model.model.get_output_embeddings() is not None
        model.run(batch, torch.zeros(1, dtype=torch.int64, device=model.device) if is_lm else None)
    finally:
        for handle in handles:
            handle.remove()
    return heard


def _spread(model: "PackedModel", batch: PackedBatch) -> Tensor:
    """Positions [1, tokens] from the first that a model has to its last, in the batch's order."""
    last = (model.max_positions or _FARTHEST) - 1
    step = max(1, last // max(1, batch.most_positions))
    return (batch.positions * step).clamp(max=last)[None]


def _merged(calls: tuple[_Heard, ...], movable: Movable) -> MergedLayer | None:
    """A layer merged, where in each of its calls it gives what it gave; else None."""
    try:
        parts = parts_of(calls[0].layer, movable=movable)
        hows = {_how(call, parts.layer) for call in calls} if parts is not None else set()
        if parts is None or len(hows) != 1:
            return None
        merged = MergedLayer(parts, hows.pop())
        same = all(_gives_the_same(merged, call) for call in calls) and _feeds_forward_the_same(
            merged, calls[0]
        )
    except _FAILURES:
        return None
    return merged if same else None


def _movable(model: nn.Module) -> Movable:
    """Where parameters lie that one module holds: none that are tied."""
    held = model.named_parameters(remove_duplicate=False)
    places = Counter(each.data_ptr() for _, each in held if is_plain(each))
    return frozenset(place for place, count in places.items() if count == 1)


def _how(call: _Heard, layer: int) -> How:
    assert call.batch.heard is not None
    return call.batch.heard[layer]


def _gives_the_same(merged: MergedLayer, call: _Heard) -> bool:
    """On its input, and on one as small as what it adds: a large residual hides the rest."""
    update = (call.output - call.hidden).float().norm(dim=-1, keepdim=True)
    size = call.hidden.float().norm(dim=-1, keepdim=True).clamp(min=1e-9)
    small = call.hidden * (update / size).clamp(max=1).to(call.hidden.dtype)
    for hidden in (call.hidden, small):
        wanted = call.layer(hidden.clone(), **call.options)
        wanted_slots = _written(merged.parts.layer, call.batch)
        given = merged(hidden, call.rotation, call.batch)
        given_slots = _written(merged.parts.layer, call.batch)
        pairs = zip(given_slots, wanted_slots, strict=True)
        if not (_are_close(given, wanted, hidden) and all(_are_close(*pair) for pair in pairs)):
            return False
    return True


def _feeds_forward_the_same(merged: MergedLayer, call: _Heard) -> bool:
    """A feed-forward on its own, also far beyond what the trial's tokens make of its input."""
    feed_forward = merged.parts.feed_forward
    if not isinstance(feed_forward, GatedFeedForward):
        return True
    for scale in _SCALES:
        given = torch.randn(call.hidden.shape[1:], generator=torch.Generator().manual_seed(0))
        given = (scale * given).to(call.hidden.device, call.hidden.dtype)
        wanted = feed_forward.module(given[None])[0]
        # Half precision ends at 65,504.
        held = wanted.isfinite().all(-1)
        if not _are_close(feed_forward(given)[held], wanted[held]):
            return False
    return True


def _written(layer: int, batch: PackedBatch) -> list[Tensor]:
    """The batch's keys and values of a layer, [tokens, kv_heads · dim]."""
    pool = batch.pool
    both = (pool.keys[layer], pool.layer_values[layer])
    return [each[batch.slots.to(each.device)].flatten(1) for each in both]


def _are_close(given: Tensor, wanted: Tensor, before: Tensor | None = None) -> bool:
    """Whether what each token gets is the same. before: what it was added to."""
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    update = wanted.double() if before is None else wanted.double() - before.double()
    allowed = _ALLOWED[wanted.dtype] * update.norm(dim=-1)
    allowed += torch.finfo(wanted.dtype).eps * wanted.double().norm(dim=-1)
    return bool(((given.double() - wanted.double()).norm(dim=-1) <= allowed).all())


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
    return replace(batch, most_positions=length, heard={})
