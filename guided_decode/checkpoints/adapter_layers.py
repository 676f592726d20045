"""Models in memory with PEFT adapters in their layers: copies on which certain adapters act."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from guided_decode.checkpoints.own_copy import own_copy


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put layers of its own into a model."""
    layer, wrapper = _classes()
    return any(isinstance(module, (*layer, *wrapper)) for module in model.modules())


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter that is still there is merged into the weights of some layer."""
    return has_adapters(model) and any(
        getattr(module, "merged_adapters", None) for module in model.modules()
    )


def settled_copy(
    model: PreTrainedModel, adapters: tuple[str, ...] | None, name: str
) -> PreTrainedModel:
    """A copy that shares the model's weights, on which these adapters act and no others can.

    What does not act is not in it: a layer without an adapter is the base's own, and so is one into
    whose weights the adapter was merged.

    Args:
        model: with adapters in its layers; it is not changed.
        adapters: None: what is active now.
        name: what errors call it.

    Raises:
        ValueError: there is no such adapter, it needs more than its layers, or another is merged
            into the weights.
    """
    known: dict[str, Any] = getattr(model, "peft_config", None) or {}
    for adapter, config in known.items():
        if adapters is None or adapter in adapters:
            refuse_beyond_layers(name, config)
    held = adapter_names(model)
    for adapter in adapters or ():
        if adapter not in held:
            raise ValueError(
                f"{name} has no adapter {adapter!r} in its layers: expected one of "
                f"{', '.join(sorted(held)) or 'none, which is what it has'}"
            )
    copied: PreTrainedModel = own_copy(model)
    settle(copied, adapters, name)
    return copied


def adapter_names(model: nn.Module) -> set[str]:
    """The names of all adapters in a model's layers."""
    layer, wrapper = _classes()
    return {
        name
        for module in model.modules()
        if isinstance(module, (*layer, *wrapper))
        for name in _held_by(module)
    }


def refuse_beyond_layers(name: str, config: Any) -> None:
    """Raises ValueError: an adapter that acts on more than single layers, as a PeftConfig says."""
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    reason = None
    if config.is_prompt_learning:
        reason = "puts virtual tokens before each text"
    elif kind == "XLORA":
        reason = "weighs its adapters anew for each text"
    elif kind == "POLY":
        reason = "needs a task id with each text"
    elif kind == "ADAPTION_PROMPT":
        reason = "has an attention of its own"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "acts from certain tokens on only (aLoRA)"
    elif getattr(config, "layer_replication", None):
        reason = "repeats layers of its base (layer_replication)"
    if reason is not None:
        raise ValueError(
            f"{name} is a PEFT adapter of type {kind} that {reason}: a prefix cache has keys and "
            "values of token ids alone; expected an adapter of single layers, LoRA say"
        )


def settle(model: nn.Module, adapters: tuple[str, ...] | None, name: str) -> None:
    """Leaves in a model of one's own what acts of its adapters; arguments as of `settled_copy`."""
    for child, module in list(model.named_children()):
        settled = _settled(module, adapters, name)
        if settled is not module:
            model._modules[child] = settled
        settle(settled, adapters, name)


def _settled(module: nn.Module, adapters: tuple[str, ...] | None, name: str) -> nn.Module:
    """What a layer comes to: itself with the adapters that act, or the layer under it."""
    layer, wrapper = _classes()
    while isinstance(module, wrapper):
        acting = _acting(module, adapters)
        modules: Any = getattr(module, "modules_to_save", None)
        if modules is not None:
            module = modules[acting[0]] if acting else module.original_module  # type: ignore[assignment]
        else:
            # Some rows of the embeddings, in a layer of their own.
            module = module.token_adapter  # type: ignore[assignment]
    if not isinstance(module, layer):
        return module
    layer_of: Any = module
    acting, merged = _acting(module, adapters), list(layer_of.merged_adapters)
    if merged and set(merged) != set(acting):
        raise ValueError(
            f"{name}: {_listed(merged)} is merged into the weights that are in memory, where "
            f"{_listed(acting)} was asked for: call unmerge_adapter() on the model, and merge "
            "what was asked for or nothing"
        )
    if merged or not acting:
        return _settled(layer_of.base_layer, adapters, name)
    layer_of.set_adapter(acting)
    layer_of.enable_adapters(True)
    for other in _held_by(module) - set(acting):
        layer_of.delete_adapter(other)
    return module


def _acting(module: Any, adapters: tuple[str, ...] | None) -> list[str]:
    """The adapters that act in a layer, of those that were asked for or are active."""
    if adapters is None:
        if module.disable_adapters:
            return []
        adapters = tuple(module.active_adapters)
    held = _held_by(module)
    return [each for each in adapters if each in held]


def _held_by(module: Any) -> set[str]:
    """The adapters that a layer has weights of."""
    found: set[str] = set()
    for attribute in module.adapter_layer_names:
        held: Any = module
        for part in attribute.split("."):
            held = getattr(held, part, None)
        if hasattr(held, "keys"):
            found.update(held.keys())
    return found


def _listed(adapters: Iterable[str]) -> str:
    return " and ".join(map(repr, adapters)) or "none"


def _classes() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """PEFT's layers and wrappers; none where nobody has imported it."""
    if sys.modules.get("peft") is None:
        return (), ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer,), (AuxiliaryTrainingWrapper,)
