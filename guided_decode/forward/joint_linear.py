"""Linear layers that read one input, as one product: a GPU reads few tokens at its weights' speed
only where there is enough to read at a time."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_decode.forward.cpu_linear import OneDnnLinear, is_plain, onednn_linear
from guided_decode.forward.hooked import is_hooked


class JointLinear:
    """Modules that read the same input.

    As one product where their weights lie side by side in memory, or may be put there; the modules'
    parameters are then views of it, and what is written to them is seen. Otherwise each runs as it
    is.
    """

    def __init__(self, modules: Sequence[nn.Module], *, owned: bool) -> None:
        """
        Args:
            modules: with a weight [size, input] each.
            owned: their weights are nobody else's, and may be moved.
        """
        self.modules = tuple(modules)
        self.owned = owned
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self.join()

    def __deepcopy__(self, memo: dict[int, Any]) -> "JointLinear":
        """The copy's weights lie apart until it is told to `join`."""
        copied = object.__new__(JointLinear)
        memo[id(self)] = copied
        copied.modules, copied.owned = copy.deepcopy(self.modules, memo), self.owned
        copied._weight = copied._bias = None
        return copied

    def __call__(self, hidden: Tensor) -> Sequence[Tensor]:
        """Outputs [tokens, size] of each, of hidden [tokens, input]."""
        if self._weight is None or not self._lies_there():
            return [module(hidden) for module in self.modules]
        by_onednn = type(self.modules[0]) is OneDnnLinear
        product = (onednn_linear if by_onednn else F.linear)(hidden, self._weight, self._bias)
        return product.split([len(module.weight) for module in self.modules], -1)  # type: ignore[arg-type]

    def join(self) -> None:
        """Puts the weights side by side, where they may be moved and do not lie so already."""
        if self.is_joined:
            return
        stayed = self._some_stayed()
        self._weight = self._bias = None
        if not _may_lie_together(self.modules):
            self.owned = False
            return
        weights: list[Any] = [module.weight for module in self.modules]
        biases: list[Any] = [module.bias for module in self.modules]
        has_bias = biases[0] is not None
        if not (_lie_together(weights) and (not has_bias or _lie_together(biases))):
            # A part that somebody moved is somebody else's too.
            self.owned = self.owned and not stayed
            if not self.owned:
                return
        self._weight = _joined(weights)
        self._bias = _joined(biases) if has_bias else None

    @property
    def is_joined(self) -> bool:
        """Whether they run as one product."""
        return self._weight is not None and self._lies_there()

    def _some_stayed(self) -> bool:
        """Whether somebody moved a part of what was joined: another who holds it, and again."""
        if self._weight is None:
            return False
        place = self._weight.untyped_storage().data_ptr()
        weights: list[Any] = [module.weight for module in self.modules]
        return any(each.untyped_storage().data_ptr() == place for each in weights)

    def _lies_there(self) -> bool:
        for name, joined in (("weight", self._weight), ("bias", self._bias)):
            if joined is not None and not _lie_at([getattr(m, name) for m in self.modules], joined):
                return False
        return True


def _joined(parameters: list[Tensor]) -> Tensor:
    """One tensor [sum of sizes, ...], of which the parameters are views."""
    first = parameters[0].data
    shape = (sum(map(len, parameters)), *first.shape[1:])
    if _lie_together(parameters):
        return first.as_strided(shape, first.stride(), first.storage_offset())
    joined = torch.cat([one.data for one in parameters])
    for one, part in zip(parameters, joined.split(list(map(len, parameters))), strict=True):
        one.data = part
    return joined


def _lie_together(parameters: list[Tensor]) -> bool:
    """Whether they lie one behind the other in one storage."""
    storages = {one.untyped_storage().data_ptr() for one in parameters}
    return len(storages) == 1 and _lie_at(parameters, parameters[0].data)


def _lie_at(parameters: list[Tensor], joined: Tensor) -> bool:
    """Whether they lie one behind the other from where `joined` begins."""
    place = joined.data_ptr()
    for part in parameters:
        if part.data_ptr() != place or not part.is_contiguous():
            return False
        place += part.nbytes
    return True


def _may_lie_together(modules: Sequence[nn.Module]) -> bool:
    kinds = {
        (type(module), type(module.weight), module.weight.dtype, module.weight.device,
         module.in_features, module.bias is None)
        if type(module) in (nn.Linear, OneDnnLinear)
        else None
        for module in modules
    }  # fmt: skip
    return (
        len(kinds) == 1
        and None not in kinds
        and all(map(_is_movable, (each for m in modules for each in m.parameters())))
        and not any(map(is_hooked, modules))
    )


def _is_movable(weight: Tensor) -> bool:
    """Whether it may become a view: what was made in inference mode would lose its mode."""
    return is_plain(weight) and not weight.is_inference()
