# mypy: allow-untyped-defs, allow-incomplete-defs
"""Guidance, temperature and Gumbel-max over the candidates, without touching the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_decode.kernels.candidate_shift import (
    MAX_CANDIDATES,
    Shift,
    candidate_logits,
    shift_candidates,
)
from guided_decode.kernels.gumbel import gumbel, gumbel_noise
from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu

if TYPE_CHECKING:
    import triton.language as tl

_NO_TOKEN = -1


def guide_sample(
    logits: Tensor,  # [rows, vocab] any float
    candidates: Tensor,  # [rows, k] int64, -1 where padded
    values: Tensor,  # [rows, k] float32
    baseline: Tensor,  # [rows] float32
    *,
    beta: Tensor,  # [rows] float32
    margin: Tensor,  # [rows] float32
    mean_baseline: Tensor,  # [rows] bool
    scored: Tensor,  # [rows, k] bool
    temperature: Tensor,  # [rows] float32
    seeds: Tensor,  # [rows] int64
    positions: Tensor,  # [rows] int64
    penalty: Tensor | None = None,  # [rows, k] float32
    min_keep: int = 1,
) -> Tensor:
    """Samples each row's next token from what guide_logits makes of it under tail="mask".

        token = argmax over C of l'(a) / temperature + g(seed, position, a)

    with l' by guide_logits, rounded to the logits' dtype, and g by gumbel_noise (Gumbel-max:
    Maddison et al. 2014). Where temperature is 0, the argmax of l'. Ties go to the lower token id.
    The token is that of the argmax over the vocabulary with the same noise and −inf outside C;
    under tail="keep" the others could be drawn, so that such rows want guide_logits instead, as
    do rows whose scores may fail: here such a row's candidates are drawn by their own logits.

    Args:
        logits: [rows, vocab], not changed; read at the candidates.
        candidates, values, baseline, beta, margin, mean_baseline, scored, penalty, min_keep: as
            guide_logits takes them.
        temperature: float32 [rows], at least 0.
        seeds: int64 [rows], the request's.
        positions: int64 [rows], of the token that is drawn; no pair (seed, position) twice.

    Returns:
        int64 [rows]; -1 for a row without candidates (padding of a CUDA graph).
    """
    shift = Shift(
        candidates, values, baseline, beta, margin, mean_baseline, scored, penalty, min_keep
    )
    if on_gpu(logits) and 0 < candidates.shape[-1] <= MAX_CANDIDATES:
        return guide_sample_triton(logits, shift, temperature, seeds, positions)
    return guide_sample_reference(logits, shift, temperature, seeds, positions)


def guide_sample_reference(
    logits: Tensor, shift: Shift, temperature: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """The specification of `guide_sample`."""
    tokens = shift.candidates
    own = logits.gather(-1, tokens.clamp(min=0))
    guided = candidate_logits(own, shift).logits.float().masked_fill(tokens < 0, -torch.inf)
    noise = gumbel_noise(seeds[:, None], positions[:, None], tokens.clamp(min=0))
    greedy = (temperature == 0)[:, None]
    keys = torch.where(greedy, guided, guided / temperature[:, None] + noise)
    best = keys.amax(-1, keepdim=True)
    last = torch.iinfo(torch.int64).max
    winner = tokens.masked_fill((keys < best) | (tokens < 0), last).amin(-1)
    return winner.masked_fill(winner == last, _NO_TOKEN)


def guide_sample_triton(
    logits: Tensor, shift: Shift, temperature: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """The same on a GPU, in one launch.

    Unfused: guide_logits' launch, which writes the vocabulary once, then a division, a softmax,
    exponential noise, a quotient and an argmax over it: 6 launches, 10 · rows · vocab · itemsize
    bytes. This reads about 60 bytes a candidate, the sector around its logit counted.
    """
    rows, _ = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = next_power_of_two(shift.candidates.shape[-1])
    _guide_sample_kernel.launch(
        (rows,),
        logits,
        tokens,
        temperature,
        seeds,
        positions,
        *shift.arguments(),
        logits.stride(0),
        logits.stride(1),
        temperature.stride(0),
        seeds.stride(0),
        positions.stride(0),
        BLOCK_K=block,
        num_warps=4 if block > 128 else 1,
    )
    return tokens


@kernel(do_not_specialize=("k", "min_keep"))
def _guide_sample_kernel(
    logits,
    tokens,
    temperature,
    seeds,
    positions,
    candidates,
    values,
    scored,
    penalty,
    baseline,
    beta,
    margin,
    mean_baseline,
    baseline_stride,
    beta_stride,
    margin_stride,
    mean_stride,
    k,
    min_keep,
    row_stride,
    token_stride,
    temperature_stride,
    seed_stride,
    position_stride,
    BLOCK_K: tl.constexpr,
):
    """One program draws one row's token."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_K)
    token = tl.load(candidates + row * k + offsets, mask=offsets < k, other=-1)
    valid = token >= 0
    own = tl.load(logits + row * row_stride + token * token_stride, mask=valid, other=0.0)
    guided, _ = shift_candidates(
        own, token, row, values, scored, penalty, baseline, beta, margin, mean_baseline,
        baseline_stride, beta_stride, margin_stride, mean_stride, k, min_keep, BLOCK_K,
    )  # fmt: skip
    keys = guided.to(tl.float32)
    heat = tl.load(temperature + row * temperature_stride)
    if heat != 0.0:
        seed = tl.load(seeds + row * seed_stride)
        position = tl.load(positions + row * position_stride)
        keys = tl.div_rn(keys, tl.zeros_like(keys) + heat) + gumbel(seed, position, token)
    keys = tl.where(valid, keys, float("-inf"))
    last: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    winner = tl.min(tl.where(valid & (keys == tl.max(keys)), token, last))
    tl.store(tokens + row, tl.where(winner == last, -1, winner))
