"""What a decoder layer of transformers is made of, by the names of its modules."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guided_decode.forward.cpu_linear import is_plain
from guided_decode.forward.fused_norms import form_of
from guided_decode.forward.hooked import is_hooked
from guided_decode.forward.joint_linear import JointLinear
from guided_decode.kernels.gated_product import ACTIVATIONS, gated_product
from guided_decode.kernels.norm import Norm
from guided_decode.kernels.rounded_norm import RoundedNorm

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx", "head_dim")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "act_fn")
# What is handed over, or goes to the packed attention. Whoever asks for more uses it: positions for
# a factor of the queries, for example.
_TAKEN = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}

# Addresses.
Movable = frozenset[int]


class GatedFeedForward:
    """down(act(gate(x)) · up(x)), with gate and up as one product."""

    def __init__(self, module: Any, activation: str, *, movable: Movable) -> None:
        self.module = module
        self.both = _joint([module.gate_proj, module.up_proj], movable)
        self.down, self.activation = module.down_proj, activation

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self.both(hidden)
        output: Tensor = self.down(gated_product(gate, up, self.activation))
        return output


class OtherFeedForward:
    """Any other, as it is: experts for example."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.module(hidden[None])
        return output[0]


class Norms(NamedTuple):
    """attention, feed_forward: of what they read. after_attention, after_feed_forward: of what they
    give, before it is added, where there are any. query, key: of a head, where there are any.
    """

    attention: RoundedNorm
    feed_forward: RoundedNorm
    after_attention: RoundedNorm | None = None
    after_feed_forward: RoundedNorm | None = None
    query: RoundedNorm | None = None
    key: RoundedNorm | None = None


class LayerParts(NamedTuple):
    """layer: its number in the pool. projections: to queries, keys and values."""

    layer: int
    head_dim: int
    norms: Norms
    projections: JointLinear
    output: nn.Module
    feed_forward: GatedFeedForward | OtherFeedForward


def parts_of(layer: nn.Module, *, movable: Movable) -> LayerParts | None:
    """A layer's parts, or None where it is made otherwise. What it does with them is not read.

    movable: where weights lie that are nobody else's, and may be moved.
    """
    attention: Any = getattr(layer, "self_attn", None)
    feed_forward = getattr(layer, "mlp", None)
    if not all(hasattr(attention, name) for name in _ATTENTION) or feed_forward is None:
        return None
    if is_hooked(layer):
        # What others put there stays.
        return None
    if not _asks_for(attention) <= _TAKEN or len(_asks_for(feed_forward)) != 1:
        return None
    norms = _norms_of(layer, attention)
    if norms is None or not isinstance(attention.head_dim, int):
        return None
    parts = LayerParts(
        int(attention.layer_idx),
        int(attention.head_dim),
        norms,
        _joint([attention.q_proj, attention.k_proj, attention.v_proj], movable),
        attention.o_proj,
        _feed_forward_of(feed_forward, movable=movable),
    )
    return parts if _is_all(parts, layer) else None


def _joint(modules: list[nn.Module], movable: Movable) -> JointLinear:
    weights = [each for module in modules for each in module.parameters()]
    owned = all(is_plain(each) and each.data_ptr() in movable for each in weights)
    return JointLinear(modules, owned=owned)


def _asks_for(module: nn.Module) -> set[str]:
    """The arguments that a module's forward names."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    own = list(parameters)[1:]
    return {each.name for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


def _is_all(parts: LayerParts, layer: nn.Module) -> bool:
    """Whether a layer holds no numbers but those of its parts: a factor may be 1 in the trial."""
    feed_forward = parts.feed_forward
    modules = [*parts.projections.modules, parts.output]
    if isinstance(feed_forward, GatedFeedForward):
        modules += [*feed_forward.both.modules, feed_forward.down]
    else:
        modules.append(feed_forward.module)
    known = {id(each.norm.weight) for each in parts.norms if each is not None}
    known |= {id(each) for module in modules for each in _numbers(module)}
    return all(id(each) in known for each in _numbers(layer))


def _numbers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _norms_of(layer: nn.Module, attention: nn.Module) -> Norms | None:
    """None where one that the names promise is missing, or is no root mean square norm."""
    # Llama's second norm stands before the feed-forward; Gemma's by that name, of four, stands
    # behind the attention.
    names = ["input_layernorm", "post_attention_layernorm"]
    if hasattr(layer, "pre_feedforward_layernorm"):
        names[1:] = ["pre_feedforward_layernorm", names[1], "post_feedforward_layernorm"]
    found = [_norm_of(layer, name) for name in names]
    heads: list[RoundedNorm | None] = []
    if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
        heads = [_norm_of(attention, name) for name in ("q_norm", "k_norm")]
        if not _alike(*heads):
            return None
    first, second, *behind = found
    if first is None or second is None or None in behind:
        return None
    return Norms(first, second, *(behind or (None, None)), *heads)


def _feed_forward_of(module: Any, *, movable: Movable) -> GatedFeedForward | OtherFeedForward:
    if all(hasattr(module, name) for name in _FEED_FORWARD):
        activation = _activation_of(module.act_fn)
        if activation is not None:
            return GatedFeedForward(module, activation, movable=movable)
    return OtherFeedForward(module)


def _activation_of(function: Any) -> str | None:
    """The name of an activation by what it gives; None for one that is not known."""
    # Far out too: some are bounded there.
    far = torch.tensor([16, 64, 1e3, 1e4], dtype=torch.float64)
    x = torch.cat([torch.linspace(-12, 12, 385, dtype=torch.float64), far, -far])
    try:
        given = function(x)
        for name, known in ACTIVATIONS.items():
            if torch.allclose(known(x), given, rtol=1e-9, atol=1e-7):
                return name
    except (RuntimeError, TypeError):
        # Also for those that give another dtype, or no tensor.
        pass
    return None


def _norm_of(owner: Any, name: str) -> RoundedNorm | None:
    module = getattr(owner, name, None)
    form = None if module is None else form_of(module)
    if module is None or form is None:
        return None
    return RoundedNorm(Norm(module.weight, form.eps, form.offset), form.rounds_first)


def _alike(query: RoundedNorm | None, key: RoundedNorm | None) -> bool:
    """Whether both are norms, of one size, and alike but for their weights."""
    if query is None or key is None:
        return False
    kinds = [(n.norm.eps, n.norm.offset, n.rounds_first, len(n.norm.weight)) for n in (query, key)]
    return kinds[0] == kinds[1]
