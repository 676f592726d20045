"""Whether a model is still what it was: its weights, its modules, and the adapters in them.

Seen are optimizer steps and `load_state_dict` (tensors count their changes), `.to`, `.data = ...`
(they lie elsewhere), modules and parameters that were replaced, and PEFT adapters that were
switched, disabled, scaled or merged. Not seen is what is written through `.data` in place: for
that there is `cache.clear()`.
"""

import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_version_of = operator.attrgetter("_version")
_place_of = torch.Tensor.data_ptr


@dataclass(frozen=True, slots=True)
class Origin:
    """A model in memory that another one shares its weights with, or the head that goes with it.

    watched: the caller's modules and tensors. read: makes the scorer's own of them, anew; of a
    head, from the trunk that it goes with. adapters: as of `WeightWatch`.
    """

    watched: tuple[nn.Module | Tensor, ...]
    read: Callable[..., Any]
    adapters: tuple[str, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        """The caller's model is no part of a scorer: its copies follow the same one."""
        return self


# By the copy, which a scorer is then made of.
_ORIGINS: "weakref.WeakKeyDictionary[nn.Module, Origin]" = weakref.WeakKeyDictionary()


def comes_from(copied: PreTrainedModel, origin: Origin) -> PreTrainedModel:
    """The copy, with a note of what it is a copy of."""
    _ORIGINS[copied] = origin
    return copied


def origin_of(model: nn.Module) -> Origin | None:
    """What a model is a copy of; None where it is nobody's."""
    return _ORIGINS.get(model)


def parts_of_model(model: nn.Module) -> list[Any]:
    """What a model is made of, whatever its numbers: modules, their classes and parameters."""
    return [
        part
        for module in model.modules()
        for part in (module, type(module), *module._parameters.values())
    ]


def are_same(parts: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(parts) == len(others) and all(map(operator.is_, parts, others))


class WeightWatch:
    """What modules and tensors are at one moment, to be asked once a call: O(modules), no copy.

    adapters: the PEFT adapters that count: those beside them may be trained, switched on and off,
    and deleted; None: all of them, and which of them are active.
    """

    def __init__(
        self, watched: Iterable[nn.Module | Tensor], adapters: tuple[str, ...] | None = None
    ) -> None:
        watched = tuple(watched)
        others = set() if adapters is None else _of_other_adapters(watched, adapters)
        modules = [
            each
            for one in watched
            if isinstance(one, nn.Module)
            for each in one.modules()
            if id(each) not in others
        ]
        entries = [
            (held, name, each)
            for module in modules
            for held in (module._parameters, module._buffers, module._modules)
            for name, each in held.items()
            if id(each) not in others
        ]
        self._holders = [held for held, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._held = [each for _, _, each in entries]
        tensors = [each for each in (*self._held, *watched) if isinstance(each, Tensor)]
        self._tensors = list({id(each): each for each in tensors}.values())
        # Tensors of inference mode count nothing, and cannot be written to outside of it.
        self._counting = [each for each in self._tensors if not each.is_inference()]
        self._placed = [each for each in self._tensors if _has_place(each)]
        self._adapted = [module for module in modules if hasattr(module, "merged_adapters")]
        self._places = list(map(_place_of, self._placed))
        self._versions = sum(map(_version_of, self._counting))
        self._of_adapted = _adapters_of if adapters is None else partial(_merged_of, adapters)
        self._adapters = list(map(self._of_adapted, self._adapted))

    def changed(self) -> bool:
        """Whether anything is not what it was."""
        try:
            same = all(map(operator.is_, map(operator.getitem, self._holders, self._names),
                           self._held))  # fmt: skip
        except KeyError:
            return True
        return not (
            same
            and sum(map(_version_of, self._counting)) == self._versions
            and list(map(_place_of, self._placed)) == self._places
            and list(map(self._of_adapted, self._adapted)) == self._adapters
        )


def _has_place(tensor: Tensor) -> bool:
    """Whether a tensor says where it lies: some that wrap others do not."""
    try:
        return _place_of(tensor) >= 0
    except (RuntimeError, NotImplementedError):
        return False


def _adapters_of(module: Any) -> tuple[Any, ...]:
    """What a PEFT layer says of its adapters."""
    return (
        tuple(module.active_adapters),
        module.disable_adapters,
        tuple(module.merged_adapters),
        tuple(getattr(module, "scaling", {}).items()),
    )


def _merged_of(adapters: tuple[str, ...], module: Any) -> tuple[Any, ...]:
    """What it says of those that count, whichever are active: in its weights lie all merged."""
    scaling = getattr(module, "scaling", {})
    return (tuple(module.merged_adapters), *(scaling.get(adapter) for adapter in adapters))


def _of_other_adapters(
    watched: Iterable[nn.Module | Tensor], adapters: tuple[str, ...]
) -> set[int]:
    """The ids of what PEFT keeps for other adapters, by their names, in its layers."""
    others: set[int] = set()
    for module in (each for one in watched if isinstance(one, nn.Module) for each in one.modules()):
        for attribute in (
            *getattr(module, "adapter_layer_names", ()),
            *getattr(module, "other_param_names", ()),
        ):
            held = getattr(module, attribute, None)
            if not isinstance(held, nn.ModuleDict | nn.ParameterDict):
                continue
            for name, each in held.items():
                if name not in adapters:
                    parts = each.modules() if isinstance(each, nn.Module) else (each,)
                    others.update(map(id, parts))
    return others
