"""Root mean square norm (Zhang and Sennrich 2019), shared by value_head and lm_head_value."""

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """weight: [hidden] any float. The factor is offset + weight: offset 1 for Gemma's."""

    weight: Tensor
    eps: float
    offset: float


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (offset + weight), float32 [..., hidden]."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return x * (norm.offset + norm.weight.float())
