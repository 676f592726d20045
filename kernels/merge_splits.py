# mypy: allow-untyped-defs, allow-incomplete-defs
"""Merges attention over parts of the keys, by each part's log-sum-exp in natural logarithms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from guided_decode.kernels.jit import kernel, next_power_of_two

if TYPE_CHECKING:
    import triton.language as tl

MAX_SPLITS = 64
_BLOCK_S = 16


def merge_splits_reference(partial: Tensor, lse: Tensor) -> Tensor:
    """Σ_i exp(lse_i − LSE) · partial_i with LSE = ln Σ_i exp(lse_i); 0 where every lse is −inf.

    Args:
        partial: float32 [splits, tokens, heads, dim], each a softmax-weighted mean of its
            part, finite where that is empty.
        lse: float32 [splits, tokens, heads], ln Σ exp(score) of the part, −inf where it is empty.

    Returns:
        float32 [tokens, heads, dim].
    """
    weights = lse.softmax(0).nan_to_num(0.0)[..., None]
    return (partial * weights).sum(0)


def merge_splits_triton(partial: Tensor, lse: Tensor, output: Tensor) -> Tensor:
    """The same on a GPU, in one launch, into output, [tokens, heads, dim] of any kernel dtype."""
    splits, tokens, heads, dim = partial.shape
    _merge_kernel.launch(
        (tokens, heads),
        partial,
        lse,
        output,
        splits,
        tokens,
        heads,
        DIM=dim,
        BLOCK_DIM=next_power_of_two(dim),
        BLOCK_S=_BLOCK_S,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=4,
    )
    return output


@kernel(do_not_specialize=("splits", "tokens"))
def _merge_kernel(
    partial,
    lse,
    output,
    splits,
    tokens,
    heads,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """One program merges the splits of one token and head."""
    place = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    stride = tokens.to(tl.int64) * heads
    every = tl.arange(0, MAX_SPLITS)
    known = tl.load(lse + every * stride + place, mask=every < splits, other=float("-inf"))
    # Padding has −inf everywhere, and −inf − (−inf) would be NaN.
    highest = tl.maximum(tl.max(known), -3.0e38)
    d = tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    weights = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split * stride + place
        weight = tl.exp(tl.load(lse + at, mask=split < splits, other=float("-inf")) - highest)
        read = (split < splits)[:, None] & (d < DIM)[None, :]
        part = tl.load(partial + at[:, None] * DIM + d[None, :], mask=read, other=0.0)
        total += tl.sum(weight[:, None] * part, 0)
        weights += weight
    mass = tl.sum(weights)
    merged = total / tl.where(mass > 0.0, mass, 1.0)
    tl.store(output + place * DIM + d, merged.to(output.dtype.element_ty), mask=d < DIM)
