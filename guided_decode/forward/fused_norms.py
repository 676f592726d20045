"""Root mean square norms of a model on a GPU, in one launch each instead of seven or eight.

A packed forward of a few tokens is bound by the weights that it reads; between the products
transformers' norms launch small kernels over float32 copies, which cost as much as a third of them.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guided_decode.forward.final_norm import eps_of, norm_of
from guided_decode.kernels import norm_rows
from guided_decode.kernels.jit import FLOATS
from guided_decode.kernels.norm import Norm
from guided_decode.kernels.norm_rows import MAX_SIZE, norm_rows_reference


class _Form(NamedTuple):
    """How a module norms: what it adds to its weight, and whether it rounds before that product."""

    eps: float
    offset: float
    rounds_first: bool


class FusedNorm:
    """What a module's class is mixed with: its forward is one launch, where gradients are off."""

    weight: nn.Parameter
    fused_form: _Form

    def forward(self, hidden: Tensor) -> Tensor:
        weight, form = self.weight, self.fused_form
        ours = _on_gpu(hidden) and hidden.dtype == weight.dtype and not torch.is_grad_enabled()
        if not ours:
            unfused: Tensor = super().forward(hidden)  # type: ignore[misc]
            return unfused
        norm = Norm(weight, form.eps, form.offset)
        return norm_rows(hidden, norm, rounds_first=form.rounds_first)


def fuse_norms(model: nn.Module) -> None:
    """Switches the root mean square norms of a model on a GPU, in place.

    Only modules that give what the formula gives, on their own weights, and whose forward is their
    class's: what hooks replace stays. Their parameters stay what they are.
    """
    forms: dict[tuple[int, int, str, str, float | None], _Form | None] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_cuda or not _is_suited(module):
            continue
        # Modules of one class, size and eps have one formula.
        place = (str(weight.dtype), str(weight.device))
        kind = (id(type(module)), len(weight), *place, eps_of(module))
        if kind not in forms:
            forms[kind] = form_of(module)
        form = forms[kind]
        if form is not None:
            switched: Any = module
            switched.__class__ = _fused(type(module))  # type: ignore[arg-type]
            switched.fused_form = form


@torch.no_grad()
def form_of(module: nn.Module) -> _Form | None:
    """A module's form, by what it gives; None where it is no root mean square norm."""
    norm = norm_of(module)
    if norm is None:
        return None
    given = _trial(norm.weight)
    expected = module(given)
    off = {
        rounds_first: float((norm_rows_reference(given, norm, rounds_first) - expected).abs().max())
        for rounds_first in (True, False)
    }
    return _Form(norm.eps, norm.offset, rounds_first=off[True] <= off[False])


def _on_gpu(hidden: Tensor) -> bool:
    return hidden.is_cuda


def _is_suited(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return (
        type(weight) is nn.Parameter
        and weight.ndim == 1
        and weight.dtype in FLOATS
        and len(weight) <= MAX_SIZE
        and not isinstance(module, FusedNorm)
        and "forward" not in vars(module)
    )


def _trial(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(8, len(weight), generator=generator, dtype=torch.float32)
    return drawn.to(weight.device, weight.dtype)


@functools.cache
def _fused(own: type[nn.Module]) -> type[nn.Module]:
    """The module's class with the fused forward before its own."""
    return type(own.__name__, (FusedNorm, own), {"__module__": own.__module__})
