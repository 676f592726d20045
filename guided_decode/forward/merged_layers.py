"""Decoder layers in ten launches instead of forty; in thirteen on a model that others hold too.

A packed forward of a few tokens takes as long as its weights are read, plus what its launches cost:
transformers' modules make some thirty small ones a layer beside the products and attention. Here a
layer is: one product for queries, keys and values; their turn, and keys and values to their slots;
attention; its product; the residual sum with the norm of it; one product for gate and up; the
gated product; its product; and the sum with the next layer's norm. Weights that are somebody else's
too are not put side by side: queries, keys, values, gate and up are products of their own then.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from guided_decode.forward.attention import attend
from guided_decode.forward.hooked import Hooks
from guided_decode.forward.layer_parts import GatedFeedForward, LayerParts
from guided_decode.forward.packed import How, PackedBatch
from guided_decode.kernels import add_norm, norm_rows, rotary_slots
from guided_decode.kernels.rotary_slots import Heads, Slots, Turn
from guided_decode.kernels.rounded_norm import RoundedNorm


class MergedLayer:
    """A layer's packed forward.

    how: of its attention. follower: the layer behind it, if that is merged too: the sum that one
    layer ends with and the norm that the next begins with are one launch.
    """

    def __init__(self, parts: LayerParts, how: How) -> None:
        self.parts, self.how = parts, how
        self.follower: MergedLayer | None = None
        # From the layer before: its output and how often that was written to, and the norm of it.
        self._given: tuple[Tensor, int, Tensor] | None = None

    def __call__(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], packed: PackedBatch
    ) -> Tensor:
        """hidden: [1, tokens, size]. rotation: cos and sin, [1, tokens, R] each."""
        parts = self.parts
        packed = packed.on(hidden.device)
        query = self._attention_input(self._normed(hidden), rotation, packed)
        attended = attend(query, packed, parts.layer, self.how)
        update = parts.output(attended.flatten(1))
        norms = parts.norms
        total, normed = add_norm(hidden[0], update, norms.feed_forward, norms.after_attention)
        update = parts.feed_forward(normed)
        after, follower = norms.after_feed_forward, self.follower
        if follower is None:
            return (total + (update if after is None else _norm(update, after)))[None]
        total, normed = add_norm(total, update, follower.parts.norms.attention, after)
        output = total[None]
        follower._given = (output, output._version, normed)
        return output

    def join(self) -> None:
        """`JointLinear.join` of its products."""
        self.parts.projections.join()
        if isinstance(self.parts.feed_forward, GatedFeedForward):
            self.parts.feed_forward.both.join()

    def _normed(self, hidden: Tensor) -> Tensor:
        """What attention reads, [tokens, size]."""
        given, self._given = self._given, None
        if given is not None:
            output, version, normed = given
            # Whoever came between two layers made another tensor, or wrote to this one.
            if output is hidden and output._version == version:
                return normed
        return _norm(hidden[0], self.parts.norms.attention)

    def _attention_input(
        self, normed: Tensor, rotation: tuple[Tensor, Tensor], packed: PackedBatch
    ) -> Tensor:
        """The turned queries, [tokens, heads, dim]; keys and values are in their slots then."""
        parts, pool = self.parts, packed.pool
        keys, values = pool.keys[parts.layer], pool.layer_values[parts.layer]
        query, key, value = parts.projections(normed)
        heads = Heads(
            query.unflatten(-1, (-1, parts.head_dim)),
            key.unflatten(-1, keys.shape[1:]),
            value.unflatten(-1, values.shape[1:]),
        )
        cos, sin = rotation
        turn = Turn(cos[0], sin[0], parts.norms.query, parts.norms.key)
        return rotary_slots(heads, turn, Slots(keys, values, packed.slots))


class Merged:
    """What a decoder layer's class is mixed with. own_class: what it was."""

    merged: MergedLayer
    hooks: Hooks
    own_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed, rotation = kwargs.get("packed"), kwargs.get("position_embeddings")
        ours = packed is not None and rotation is not None and packed.heard is None
        others = args or torch.is_grad_enabled() or kwargs.get("attention_mask") is not None
        if not ours or others or self.hooks:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        assert packed is not None
        assert rotation is not None
        return self.merged(hidden_states, rotation, packed)


def switch(layer: nn.Module, merged: MergedLayer) -> None:
    """From now on a layer's packed forward is the merged one; any other stays its own."""
    switched: Any = layer
    if not isinstance(layer, Merged):
        switched.__class__ = _class_of(type(layer))  # type: ignore[arg-type]
    switched.merged = merged
    switched.hooks = Hooks(layer)


def merged_layers(model: nn.Module) -> int:
    """How many of its layers are merged."""
    return sum(isinstance(module, Merged) for module in model.modules())


def switch_back(model: nn.Module) -> int:
    """Makes every merged layer of a model what it was before `switch`; returns how many."""
    layers = [module for module in model.modules() if isinstance(module, Merged)]
    for layer in layers:
        switched: Any = layer
        switched.__class__ = layer.own_class
        del switched.merged, switched.hooks
    return len(layers)


def _norm(hidden: Tensor, norm: RoundedNorm) -> Tensor:
    return norm_rows(hidden, norm.norm, rounds_first=norm.rounds_first)


@functools.cache
def _class_of(own: type[nn.Module]) -> type[nn.Module]:
    """The layer's class with the merged forward before its own."""
    names = {"__module__": own.__module__, "own_class": own}
    return type(own.__name__, (Merged, own), names)
