# mypy: allow-untyped-defs, allow-incomplete-defs
"""The policy's final norm, its lm_head and a value head in one pass: logits and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu
from guided_decode.kernels.norm import Norm, rms_norm
from guided_decode.kernels.row_values import hidden_block, write_row_values

if TYPE_CHECKING:
    import triton.language as tl

# Beyond these torch's own product wins, or one program does not hold the labels.
MAX_ROWS = 64
MAX_LABELS = 16


class ValueWeights(NamedTuple):
    """weight: [labels, hidden] any float. bias: [labels] any float, or None."""

    weight: Tensor
    bias: Tensor | None


def lm_head_value(
    hidden: Tensor,  # [tokens, hidden] any float
    lm_head: nn.Module,
    weight: Tensor,  # [labels, hidden] any float
    bias: Tensor | None = None,  # [labels] any float
    *,
    norm_weight: Tensor | None = None,  # [hidden] any float
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    rows: Tensor | None = None,  # [n] int64
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and values of the rows that are read, of the same normed hidden states.

        x = hidden[rows], or all tokens; normed as value_head does, if norm_weight is given
        logits = lm_head(x) · scale, then softcap · tanh(logits / softcap) where softcap is given
        values = x · weightᵀ + bias

    Fused where `fuses` says so and for up to 64 rows and 16 labels on a GPU; else torch runs the
    reference, in which lm_head is called as it is.

    Args:
        hidden: [tokens, hidden]; before the final norm when norm_weight is given, else after it.
        lm_head: the policy's, of hidden's dtype: a module from [n, hidden] to [n, vocab].
        weight: [labels, hidden], the value head's.
        bias: [labels], or None.
        norm_weight, norm_eps, norm_offset: as value_head takes them.
        rows: int64 [n], indices of the tokens that are read; -1 reads none (padding of a CUDA
            graph).
        scale: Cohere's logit_scale, or 1 / Granite's logits_scaling.
        softcap: Gemma's final_logit_softcapping, or None.

    Returns:
        logits [n, vocab] of hidden's dtype, −inf where rows is -1; values float32 [n, labels],
        accumulated in float32, NaN where rows is -1.

    Raises:
        ValueError: the hidden sizes differ.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden has size {hidden.shape[-1]} but the value head's weight has "
            f"{weight.shape[-1]}: they should be of one trunk"
        )
    norm = None if norm_weight is None else Norm(norm_weight, norm_eps, norm_offset)
    value = ValueWeights(weight, bias)
    n = len(hidden) if rows is None else len(rows)
    if (
        n <= MAX_ROWS
        and len(weight) <= MAX_LABELS
        and fuses(lm_head, hidden.dtype, scale, softcap)
        and on_gpu(hidden, weight, bias, norm_weight)
    ):
        assert isinstance(lm_head, nn.Linear)
        return lm_head_value_triton(hidden, lm_head, value, norm, rows)
    return lm_head_value_reference(hidden, lm_head, value, norm, rows, scale, softcap)


def fuses(lm_head: nn.Module, dtype: torch.dtype, scale: float, softcap: float | None) -> bool:
    """Whether a head is a plain linear layer of this dtype, and its logits are what it gives.

    Quantised heads (another class, or a weight of a tensor subclass or another dtype), heads that
    something hooks or wraps, scaled heads and soft-capped heads are not.
    """
    return (
        type(lm_head) is nn.Linear
        and type(lm_head.weight) in (Tensor, nn.Parameter)
        and lm_head.weight.dtype == dtype
        and not (lm_head._forward_hooks or lm_head._forward_pre_hooks)
        and "forward" not in vars(lm_head)
        and scale == 1.0
        and softcap is None
    )


def lm_head_value_reference(
    hidden: Tensor,
    lm_head: nn.Module,
    value: ValueWeights,
    norm: Norm | None,
    rows: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The specification of `lm_head_value`."""
    x = hidden if rows is None else hidden[rows]
    x = x.float() if norm is None else rms_norm(x, norm)
    logits = lm_head(x.to(hidden.dtype)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    bias = None if value.bias is None else value.bias.float()
    values = nn.functional.linear(x, value.weight.float(), bias)
    if rows is None:
        return logits, values
    padded = (rows < 0)[:, None]
    return logits.masked_fill(padded, -torch.inf), values.masked_fill(padded, torch.nan)


class Tile(NamedTuple):
    """Fixed launch parameters: rows, tokens of the vocabulary and hidden dimensions a step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Of hidden states in float16: what a norm has not yet divided may be too large for it.
_SHRINK = 2.0**-4

# By float32 or not; the smallest m that holds the rows is taken, else the largest. Those of 16 bits
# were the fastest of some sixty on an H200.
TILES = {
    False: (Tile(16, 128, 128, 8, 3), Tile(64, 128, 64, 8, 4)),
    True: (Tile(16, 64, 32, 4, 2),),
}


def lm_head_value_triton(
    hidden: Tensor, lm_head: nn.Linear, value: ValueWeights, norm: Norm | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same on a GPU, in one launch.

    Unfused: a gather, 9 launches of norm, lm_head's product, and 2 for the value head, whose
    n · h · 40 bytes or so come on top of the vocab · h · itemsize that any way reads. This reads
    lm_head and the hidden states once from memory (each program finds the latter in the cache),
    writes the logits and the values, and keeps no normed copy.
    """
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    n = len(hidden) if rows is None else len(rows)
    vocab, size = lm_head.weight.shape
    labels = len(value.weight)
    tiles = TILES[hidden.dtype == torch.float32]
    tile = next((tile for tile in tiles if tile.m >= n), tiles[-1])
    logits = torch.empty(n, vocab, dtype=hidden.dtype, device=hidden.device)
    values = torch.empty(n, labels, dtype=torch.float32, device=hidden.device)
    block = next_power_of_two(labels)
    blocks = -(-n // tile.m) * -(-vocab // tile.n)
    _lm_head_value_kernel.launch(
        (n + blocks if n else 0,),
        hidden,
        lm_head.weight.contiguous(),
        lm_head.bias,
        value.weight.contiguous(),
        value.bias,
        None if norm is None else norm.weight,
        None if rows is None else rows.contiguous(),
        logits,
        values,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        hidden.stride(0),
        n,
        vocab,
        labels,
        size,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_L=block,
        BLOCK_H=hidden_block(block),
        SHRINK=_SHRINK if hidden.dtype == torch.float16 else 1.0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return logits, values


@kernel(do_not_specialize=("n",))
def _lm_head_value_kernel(
    hidden,
    lm_weight,
    lm_bias,
    weight,
    bias,
    norm_weight,
    rows,
    logits,
    values,
    eps,
    offset,
    token_stride,
    n,
    vocab,
    labels,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SHRINK: tl.constexpr,
):
    """The first n programs take a row's values each, the others a tile of the logits each."""
    program = tl.program_id(0)
    if program < n:
        write_row_values(
            hidden, weight, bias, norm_weight, rows, values, eps, offset, token_stride, labels,
            size, program, 0, BLOCK_L, BLOCK_H,
        )  # fmt: skip
    else:
        row_blocks = tl.cdiv(n, BLOCK_M)
        _logits_of_tile(
            hidden, lm_weight, lm_bias, norm_weight, rows, logits, eps, offset, token_stride, n,
            vocab, size, (program - n) % row_blocks, (program - n) // row_blocks,
            BLOCK_M, BLOCK_N, BLOCK_K, SHRINK,
        )  # fmt: skip


@kernel()
def _logits_of_tile(
    hidden, weight, bias, norm_weight, rows, logits, eps, offset, token_stride, n, vocab, size,
    row_block, vocab_block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SHRINK: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_M rows for BLOCK_N tokens: norm and product in one pass over the rows.

    SHRINK keeps what the norm would have made small within float16; 1 for the other dtypes.
    """
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row.to(tl.int64)
    if rows is not None:
        token = tl.load(rows + row, mask=row < n, other=-1)
    read = ((row < n) & (token >= 0))[:, None]
    x_of = hidden + token[:, None] * token_stride
    column = vocab_block * BLOCK_N + tl.arange(0, BLOCK_N)
    known = column < vocab
    w_of = weight + column[None, :].to(tl.int64) * size
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A row's norm is one factor: it comes after the product, and nothing is read twice for it.
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_of + k[None, :], mask=read & (k < size)[None, :], other=0.0)
        if norm_weight is not None:
            exact = x.to(tl.float32) * SHRINK
            squares += exact * exact
            gain = offset + tl.load(norm_weight + k, mask=k < size, other=0.0).to(tl.float32)
            x = (exact * gain[None, :]).to(x.dtype)
        w = tl.load(w_of + k[:, None], mask=known[None, :] & (k < size)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if norm_weight is not None:
        total *= tl.rsqrt(tl.sum(squares, 1) / size + eps * SHRINK * SHRINK)[:, None]
    if bias is not None:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    total = tl.where(read, total, float("-inf"))
    tl.store(
        logits + row[:, None].to(tl.int64) * vocab + column[None, :],
        total.to(logits.dtype.element_ty), mask=(row < n)[:, None] & known[None, :],
    )  # fmt: skip
