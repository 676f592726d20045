# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sampling by Gumbel-max, whose noise is a function of seed, position and token id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_decode.kernels.gumbel import gumbel, gumbel_noise
from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_V = 1024
# Rows of a vocabulary beyond this go to the reference: the second launch holds its blocks.
MAX_VOCAB = 1 << 20


def sample_tokens(
    logits: Tensor,  # [rows, vocab] any float
    temperature: Tensor,  # [rows] float32
    seeds: Tensor,  # [rows] int64
    positions: Tensor,  # [rows] int64
) -> Tensor:
    """Draws each row's next token from softmax(logits / temperature).

        token = argmax over v of l(v) / temperature + g(seed, position, v)

    with g by gumbel_noise (Gumbel-max: Maddison et al. 2014). Where temperature is 0, the argmax of
    l. Ties go to the lower token id. What is NaN counts as −inf: a row of nothing else draws 0.
    What a row draws depends on nothing but its own arguments.

    Args:
        logits: [rows, vocab], not changed; −inf is never drawn beside a finite one.
        temperature: float32 [rows], at least 0.
        seeds: int64 [rows], the request's.
        positions: int64 [rows], of the token that is drawn; no pair (seed, position) twice.

    Returns:
        int64 [rows].
    """
    if on_gpu(logits) and logits.shape[-1] <= MAX_VOCAB:
        return sample_tokens_triton(logits, temperature, seeds, positions)
    return sample_tokens_reference(logits, temperature, seeds, positions)


def sample_tokens_reference(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """The specification of `sample_tokens`."""
    return sampling_keys(logits, temperature, seeds, positions).argmax(-1)


def sampling_keys(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """What the largest of is drawn, float32 [rows, vocab]; arguments as of `sample_tokens`."""
    greedy, heat = (temperature == 0)[:, None], temperature[:, None]
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    noise = gumbel_noise(seeds[:, None], positions[:, None], vocabulary)
    own = logits.float()
    keys = torch.where(greedy, own, own / heat.masked_fill(greedy, 1.0) + noise)
    return keys.masked_fill(keys.isnan(), -torch.inf)


def sample_tokens_triton(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """The same on a GPU, in two launches.

    Unfused: Philox in int64, some 200 launches over [rows, vocab] of 8 bytes a number. This reads
    itemsize bytes a token, and writes and reads 12 for each 1024 of them.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // _BLOCK_V)
    keys = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _best_of_blocks_kernel.launch(
        (rows, blocks),
        logits,
        keys,
        tokens,
        temperature,
        seeds,
        positions,
        vocab,
        logits.stride(0),
        logits.stride(1),
        temperature.stride(0),
        seeds.stride(0),
        positions.stride(0),
        BLOCK_V=_BLOCK_V,
        num_warps=4,
    )
    _best_of_rows_kernel.launch(
        (rows,), keys, tokens, drawn, blocks, BLOCKS=next_power_of_two(blocks), num_warps=1
    )
    return drawn


@kernel()
def _best_of_blocks_kernel(
    logits,
    keys,
    tokens,
    temperature,
    seeds,
    positions,
    vocab,
    row_stride,
    token_stride,
    temperature_stride,
    seed_stride,
    position_stride,
    BLOCK_V: tl.constexpr,
):
    """One program finds the largest key of BLOCK_V tokens of a row, and the first that has it."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    inside = token < vocab
    at = logits + row * row_stride + token * token_stride
    key = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row * temperature_stride)
    if heat != 0.0:
        seed = tl.load(seeds + row * seed_stride)
        position = tl.load(positions + row * position_stride)
        key = tl.div_rn(key, tl.zeros_like(key) + heat) + gumbel(seed, position, token)
    key = tl.where(key == key, key, float("-inf"))
    best = tl.max(key)
    first = tl.min(tl.where(inside & (key == best), token, 0x7FFFFFFFFFFFFFFF))
    tl.store(keys + row * tl.num_programs(1) + block, best)
    tl.store(tokens + row * tl.num_programs(1) + block, first)


@kernel()
def _best_of_rows_kernel(keys, tokens, drawn, blocks, BLOCKS: tl.constexpr):
    """One program finds the best of a row's blocks: of equal ones the first."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    key = tl.load(keys + row * blocks + block, mask=inside, other=float("-inf"))
    token = tl.load(tokens + row * blocks + block, mask=inside, other=0x7FFFFFFFFFFFFFFF)
    best = inside & (key == tl.max(key))
    tl.store(drawn + row, tl.min(tl.where(best, token, 0x7FFFFFFFFFFFFFFF)))
