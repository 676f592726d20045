# mypy: allow-untyped-defs, allow-incomplete-defs
"""Value head: final RMSNorm (optional) and a linear head, on the rows that are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu
from guided_decode.kernels.norm import Norm, rms_norm
from guided_decode.kernels.row_values import hidden_block, write_row_values

if TYPE_CHECKING:
    import triton.language as tl

# Labels that one program takes at most.
_MOST_LABELS = 16


def value_head(
    hidden: Tensor,  # [tokens, hidden] any float
    weight: Tensor,  # [labels, hidden] any float
    bias: Tensor | None = None,  # [labels] any float
    *,
    norm_weight: Tensor | None = None,  # [hidden] any float
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    rows: Tensor | None = None,  # [n] int64
) -> Tensor:
    """Head outputs of the rows that are read, accumulated in float32.

        x = hidden[rows], or all tokens
        x = x / sqrt(mean(x²) + norm_eps) · (norm_offset + norm_weight), if norm_weight is given
        output = x · weightᵀ + bias

    Args:
        hidden: [tokens, hidden]; before the final norm when norm_weight is given, else after it.
        weight: [labels, hidden].
        bias: [labels], or None.
        norm_weight: [hidden]; norm_offset is 1 for Gemma, which stores weight − 1.
        norm_eps: added to the mean square.
        norm_offset: added to norm_weight.
        rows: int64 [n], indices of the tokens that are read; -1 reads none (padding of a CUDA
            graph).

    Returns:
        float32 [n, labels]; NaN where rows is -1.

    Raises:
        ValueError: the hidden sizes differ.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden has size {hidden.shape[-1]} but the head's weight has {weight.shape[-1]}: "
            "they should be of one model"
        )
    norm = None if norm_weight is None else Norm(norm_weight, norm_eps, norm_offset)
    implementation = value_head_reference
    if on_gpu(hidden, weight, bias, norm_weight):
        implementation = value_head_triton
    return implementation(hidden, weight, bias, norm, rows)


def value_head_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, rows: Tensor | None
) -> Tensor:
    """The specification of `value_head`."""
    x = (hidden if rows is None else hidden[rows]).float()
    if norm is not None:
        x = rms_norm(x, norm)
    bias = None if bias is None else bias.float()
    output = torch.nn.functional.linear(x, weight.float(), bias)
    return output if rows is None else output.masked_fill_((rows < 0)[:, None], torch.nan)


def value_head_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, rows: Tensor | None
) -> Tensor:
    """The same on a GPU, in one launch.

    Unfused, n rows of h: a gather, conversions to float32, seven launches of norm, a product with
    its bias: 11 launches, which move about n · h · 40 bytes. This moves n · h · itemsize bytes, and
    the head (labels · h · 4), which all programs share in the cache; norm or not, a row is read
    once.
    """
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    labels, size = weight.shape
    n = len(hidden) if rows is None else len(rows)
    output = torch.empty(n, labels, dtype=torch.float32, device=hidden.device)
    block = min(_MOST_LABELS, next_power_of_two(labels))
    _value_head_kernel.launch(
        (n, -(-labels // block)),
        hidden,
        weight.contiguous(),
        bias,
        None if norm is None else norm.weight,
        None if rows is None else rows.contiguous(),
        output,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        hidden.stride(0),
        labels,
        size,
        BLOCK_L=block,
        BLOCK_H=hidden_block(block),
        num_warps=8,
    )
    return output


@kernel()
def _value_head_kernel(
    hidden,
    weight,
    bias,
    norm_weight,
    rows,
    output,
    eps,
    offset,
    token_stride,
    labels,
    size,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program reads one row, for up to BLOCK_L labels."""
    write_row_values(
        hidden, weight, bias, norm_weight, rows, output, eps, offset, token_stride, labels, size,
        tl.program_id(0), tl.program_id(1) * BLOCK_L, BLOCK_L, BLOCK_H,
    )  # fmt: skip
