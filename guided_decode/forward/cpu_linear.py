"""Linear layers of a float32 model on a CPU, through oneDNN instead of torch's default, MKL.

A packed forward on a CPU is mostly narrow matrix products: few tokens, large weights. There MKL
takes up to twice oneDNN's time on processors that are not Intel's. Torch has both, and sends only
lower precisions to oneDNN; the operation used here is the one that torch's own compiler emits.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """nn.Linear whose float32 products on a CPU are oneDNN's, where gradients are off."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn_linear(input, self.weight, self.bias)


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, by oneDNN in float32 on a CPU; only for those that `use_onednn` switched."""
    ours = input.is_cpu and input.dtype is weight.dtype is torch.float32 and is_plain(weight)
    if ours and not torch.is_grad_enabled():
        return _onednn(input, weight, bias)
    return F.linear(input, weight, bias)


def use_onednn(model: nn.Module) -> None:
    """Switches the plain linear layers of a model, in place, where there is something to gain.

    Only modules of exactly the class nn.Linear, with float32 weights on a CPU and no gradients:
    their parameters stay what they are. Quantised weights, which may lie in an nn.Linear as tensors
    of a class of their own, keep their library's products.
    """
    if not (torch.backends.mkldnn.is_available() and _is_there()):
        return
    for module in model.modules():
        if type(module) is nn.Linear and _is_suited(module.weight):
            module.__class__ = OneDnnLinear


def _onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


@functools.cache
def _is_there() -> bool:
    """Whether this torch has the operation, which is not of its public interface, as it was."""
    x, weight = (torch.ones(n, 3, dtype=torch.float32) for n in (2, 4))
    try:
        return torch.equal(_onednn(x, weight, None), F.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


def is_plain(weight: Tensor) -> bool:
    """Whether it is numbers as they are: torchao's tensors say that they are float32, too."""
    return type(weight) in (nn.Parameter, Tensor)


def _is_suited(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    plain = on_cpu and is_plain(weight)
    return plain and not weight.requires_grad and weight.is_contiguous()
