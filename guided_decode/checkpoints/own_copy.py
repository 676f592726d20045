"""A copy of a module for a scorer's own use: its weights are shared, quantised ones too, and all
else is its own."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from guided_decode.checkpoints.quantised_layers import is_quantised

# Of transformers: what a model that was once asked for hidden states or attentions goes on to have
# on its layers, where it does nothing until it is asked again.
_CAPTURING = "transformers.utils.output_capturing"
_IS_CAPTURING = "_output_capturing_hooks_installed"

# How deep a layer's own records (bitsandbytes' states, HQQ's dicts) hold tensors.
_DEEPEST = 3


def own_copy(model: nn.Module) -> Any:
    """The module on its own deep copy of the config, sharing the weights and nothing else.

    Others' hooks come along, but for those by which transformers reads hidden states: it puts them
    there again when the copy is asked for any.
    """
    shared: dict[int, Any] = {id(weight): _shared(weight) for weight in model.parameters()}
    if is_quantised(model):
        # Packed weights and their scales lie in buffers and in records beside the parameters.
        shared = {id(each): each for each in _beside(model)} | shared
    copied: nn.Module = copy.deepcopy(model, shared)
    for module in copied.modules():
        _forget_capturing(module)
    return copied


def _forget_capturing(module: nn.Module) -> None:
    vars(module).pop(_IS_CAPTURING, None)
    for number, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) == _CAPTURING:
            del module._forward_hooks[number]


def _shared(weight: Any) -> Any:
    """A parameter of one's own in the same memory."""
    kind = type(weight).__name__
    if kind == "Params4bit":
        # bitsandbytes packs weights anew for some CPUs, and notes it in the record of the weight.
        alias = copy.copy(weight)
        alias.quant_state = copy.copy(weight.quant_state)
        return alias
    if kind == "Int8Params":
        # The first forward moves the scales from the weight to the layer.
        return type(weight)(
            weight.data,
            requires_grad=False,
            has_fp16_weights=weight.has_fp16_weights,
            CB=weight.CB,
            SCB=weight.SCB,
        )
    return nn.Parameter(weight.detach(), requires_grad=False)


def _beside(model: nn.Module) -> Iterator[Tensor]:
    """Tensors of a model's layers that are no parameters."""
    for module in model.modules():
        yield from module.buffers(recurse=False)
        for name, held in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules", "config"):
                yield from _tensors_in(held, _DEEPEST)


def _tensors_in(held: Any, deep: int) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif deep and not isinstance(held, nn.Module):
        inside = held.values() if isinstance(held, dict) else getattr(held, "__dict__", {}).values()
        for each in inside:
            yield from _tensors_in(each, deep - 1)
