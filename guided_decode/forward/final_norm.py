"""A trunk's final norm, taken off so that kernels apply it on the way to what reads it."""

import torch
from torch import nn
from transformers import PreTrainedModel

from guided_decode.kernels.norm import Norm, rms_norm

# Largest difference by dtype: modules round before they multiply by the weight, kernels after.
_ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Llama's factor is the weight, Gemma's is 1 + weight.
_OFFSETS = (0.0, 1.0)


class TakenNorm(nn.Identity):
    """What stands where the norm was; `norm` is what was taken."""

    def __init__(self, norm: Norm, module: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        # Not as a part of the trunk, whose weights it would be again.
        self._taken = (module,)

    @property
    def module(self) -> nn.Module:
        """The trunk's own norm."""
        return self._taken[0]


def put_back_final_norm(trunk: PreTrainedModel) -> None:
    """Undoes `take_final_norm`, for who reads the trunk's weights."""
    taken = getattr(trunk, "norm", None)
    if isinstance(taken, TakenNorm):
        trunk.norm = taken.module


def take_final_norm(trunk: PreTrainedModel) -> Norm | None:
    """Takes the final norm off a trunk, which then answers hidden states before it.

    Only a root mean square norm under the name `norm` that gives what `rms_norm` gives; any other
    stays where it is.

    Args:
        trunk: a copy of one's own: the module is replaced. From one whose norm was taken before
            comes the same again.

    Returns:
        The norm, or None where the trunk keeps its own.
    """
    module = getattr(trunk, "norm", None)
    if isinstance(module, TakenNorm):
        return module.norm
    if not isinstance(module, nn.Module):
        return None
    norm = norm_of(module)
    if norm is not None and norm.weight.device != trunk.device:
        # Of a trunk on several devices: hidden states are read where its inputs go.
        return None
    if norm is not None:
        trunk.norm = TakenNorm(norm, module)
    return norm


def eps_of(module: nn.Module) -> float | None:
    """What a module adds to the mean square, by either of its names; None where it has none."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def norm_of(module: nn.Module) -> Norm | None:
    """What a module is, where it gives what `rms_norm` gives on its weights; else None."""
    weight = getattr(module, "weight", None)
    eps = eps_of(module)
    if not isinstance(weight, nn.Parameter) or eps is None:
        return None
    if weight.dtype not in _ALLOWED or weight.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, len(weight), generator=generator, dtype=torch.float32).to(
        weight.device, weight.dtype
    )
    expected = module(x).float()
    for offset in _OFFSETS:
        norm = Norm(weight.detach(), eps, offset)
        differs = (rms_norm(x, norm) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if float(differs) <= _ALLOWED[weight.dtype]:
            return norm
    return None
