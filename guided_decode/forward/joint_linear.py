"""Linear layers that read one input, as one product: a GPU reads few tokens at its weights' speed
only where there is enough to read at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_decode.forward.cpu_linear import OneDnnLinear, is_plain, onednn_linear
from guided_decode.forward.hooked import is_hooked


class JointLinear:
    """Modules that read the same input.

    As one product where their weights may lie side by side in memory; the modules' parameters are
    then views of it, and what is written to them is seen. Otherwise each runs as it is.
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

    def __call__(self, hidden: Tensor) -> Sequence[Tensor]:
        """Outputs [tokens, size] of each, of hidden [tokens, input]."""
        if not (self.owned and self._join()):
            return [module(hidden) for module in self.modules]
        assert self._weight is not None
        by_onednn = type(self.modules[0]) is OneDnnLinear
        product = (onednn_linear if by_onednn else F.linear)(hidden, self._weight, self._bias)
        return product.split([len(module.weight) for module in self.modules], -1)  # type: ignore[arg-type]

    def _join(self) -> bool:
        """Whether the weights lie side by side: also those of a copy, which lie apart at first."""
        if self._weight is not None and self._lies_there("weight", self._weight):
            return self._bias is None or self._lies_there("bias", self._bias)
        if not _may_lie_together(self.modules):
            self.owned = False
            return False
        self._weight = self._moved("weight")
        self._bias = None if self.modules[0].bias is None else self._moved("bias")
        return True

    def _moved(self, name: str) -> Tensor:
        parameters = [getattr(module, name) for module in self.modules]
        joined = torch.cat([one.data for one in parameters])
        for one, part in zip(parameters, joined.split(list(map(len, parameters))), strict=True):
            one.data = part
        return joined

    def _lies_there(self, name: str, joined: Tensor) -> bool:
        place = joined.data_ptr()
        for module in self.modules:
            part = getattr(module, name)
            if part.data_ptr() != place:
                return False
            place += part.nbytes
        return True


def _may_lie_together(modules: Sequence[nn.Module]) -> bool:
    kinds = {
        (type(module), type(module.weight), module.weight.dtype, module.weight.device,
         module.bias is None)
        if type(module) in (nn.Linear, OneDnnLinear)
        else None
        for module in modules
    }  # fmt: skip
    return (
        len(kinds) == 1
        and None not in kinds
        and all(is_plain(module.weight) for module in modules)  # type: ignore[arg-type]
        and not any(map(is_hooked, modules))
    )
