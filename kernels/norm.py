# mypy: allow-untyped-defs, allow-incomplete-defs
"""Root mean square norm (Zhang and Sennrich 2019), shared by value_head and lm_head_value."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


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


@kernel()
def head_of_row(
    hidden, weight, norm_weight, eps, offset, label, labels, size,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """norm(hidden) · weightᵀ of one row in one pass: float32 [BLOCK_L], for label [BLOCK_L].

    The norm's factor of the row is taken out of the sum, so that nothing is read twice. Without
    norm_weight the row is taken as it is.
    """
    dots = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    squares = tl.zeros([BLOCK_H], tl.float32)
    rows = label[:, None].to(tl.int64) * size
    for start in range(0, size, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        inside = at < size
        x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        squares += x * x
        if norm_weight is not None:
            x *= offset + tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)
        read = (label < labels)[:, None] & inside[None, :]
        w = tl.load(weight + rows + at[None, :], mask=read, other=0.0).to(tl.float32)
        dots += x[None, :] * w
    output = tl.sum(dots, 1)
    if norm_weight is not None:
        output *= tl.rsqrt(tl.sum(squares) / size + eps)
    return output
