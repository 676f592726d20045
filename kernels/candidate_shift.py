# mypy: allow-untyped-defs, allow-incomplete-defs
"""What guidance makes of each candidate's logit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

# More candidates than one program holds go to the reference.
MAX_CANDIDATES = 1024

# Why a row keeps its logits.
UNUSABLE, OVERFLOWED = 1, 2


class Shift(NamedTuple):
    """What moves the logits of candidates, as guide_logits takes it.

    candidates: int64 [rows, k]. values, penalty: float32 [rows, k]. scored: bool [rows, k].
    baseline, beta, margin: float32 [rows]. mean_baseline: bool [rows].
    """

    candidates: Tensor
    values: Tensor
    baseline: Tensor
    beta: Tensor
    margin: Tensor
    mean_baseline: Tensor
    scored: Tensor
    penalty: Tensor | None
    min_keep: int

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of a kernel that calls `shift_candidates`, from `candidates` on."""
        per_row = (self.baseline, self.beta, self.margin, self.mean_baseline)
        return (
            self.candidates.contiguous(),
            self.values.contiguous(),
            self.scored.contiguous(),
            None if self.penalty is None else self.penalty.contiguous(),
            *per_row,
            *(tensor.stride(0) for tensor in per_row),
            self.candidates.shape[-1],
            self.min_keep,
        )


class Shifted(NamedTuple):
    """logits: [rows, k], the candidates'. failed: int32 [rows], 0, UNUSABLE or OVERFLOWED."""

    logits: Tensor
    failed: Tensor


def candidate_logits(own: Tensor, shift: Shift) -> Shifted:
    """The guided logits of candidates, by guide_logits' formula.

    Args:
        own: [rows, k] any float, their logits; anything where padded.
        shift: what moves them.

    Returns:
        [rows, k] of own's dtype, anything where padded; a row that failed has its own.
    """
    scored = shift.scored & (shift.candidates >= 0)
    quality = shift.values.masked_fill(~scored, 0.0)
    count = scored.sum(-1)
    # Comparisons with NaN are false.
    usable = (quality.abs() < torch.inf).all(-1)
    usable &= (shift.baseline.abs() < torch.inf) | (count == 0)

    if shift.penalty is not None:
        usable &= (shift.penalty.masked_fill(~scored, 0.0).abs() < torch.inf).all(-1)
    advantage = candidate_advantages(
        shift.values, shift.baseline, shift.mean_baseline, scored, shift.penalty
    )
    kept = min(shift.min_keep, own.shape[-1])
    best = advantage.masked_fill(~scored, -torch.inf).topk(kept).values
    least = torch.minimum(best[:, :1] - shift.margin[:, None], best[:, -1:])
    moved = scored & (shift.beta != 0)[:, None]
    shifted = torch.where(moved, own + shift.beta[:, None] * advantage, own).to(own.dtype)
    overflowed = (moved & (own.abs() < torch.inf) & ~(shifted.abs() < torch.inf)).any(-1)

    failed = torch.where(usable, OVERFLOWED * overflowed, UNUSABLE)
    guided = shifted.masked_fill(scored & (advantage < least), -torch.inf)
    return Shifted(torch.where((failed != 0)[:, None], own, guided), failed.int())


def reweighted(own: Tensor, shift: Shift) -> Tensor | None:
    """`candidate_logits` where beta is nowhere 0, margin inf, and the baseline no mean, without a
    penalty or padding: in few operations. None where a row fails.
    """
    # Scores may come in another dtype than beta's.
    moves = (shift.values - shift.baseline[:, None]) * shift.beta[:, None]
    # x + −0.0 is x, bit for bit.
    moved = (own + moves.masked_fill_(~shift.scored, -0.0)).to(own.dtype)
    return moved if math.isfinite(moved.sum(dtype=torch.float32).item()) else None


def candidate_advantages(
    values: Tensor,  # [rows, k] float32
    baseline: Tensor,  # [rows] float32
    mean_baseline: Tensor,  # [rows] bool
    scored: Tensor,  # [rows, k] bool
    penalty: Tensor | None = None,  # [rows, k] float32
) -> Tensor:
    """A(a) of guide_logits' formula, float32 [rows, k]; anything where one is not scored."""
    quality = values.masked_fill(~scored, 0.0)
    mean = quality.sum(-1) / scored.sum(-1).clamp(min=1)
    advantage = quality - torch.where(mean_baseline, mean, baseline)[:, None]
    return advantage if penalty is None else advantage - penalty.masked_fill(~scored, 0.0)


@kernel()
def shift_candidates(
    own,
    token,
    row,
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
    BLOCK_K: tl.constexpr,
):
    """`candidate_logits` of one row: own and token are [BLOCK_K]; gives logits and failed."""
    infinity = float("inf")
    at = row * k + tl.arange(0, BLOCK_K)
    counted = tl.load(scored + at, mask=token >= 0, other=0) != 0
    quality = tl.load(values + at, mask=counted, other=0.0)
    count = tl.sum(counted.to(tl.int32))
    base = tl.load(baseline + row * baseline_stride)
    # Comparisons with NaN are false.
    usable = tl.min(tl.where(tl.abs(quality) < infinity, 1, 0))
    usable = tl.where((tl.abs(base) < infinity) | (count == 0), usable, 0)
    if tl.load(mean_baseline + row * mean_stride):
        base = tl.div_rn(tl.sum(quality), tl.maximum(count, 1).to(tl.float32))
    advantage = quality - base
    if penalty is not None:
        cost = tl.load(penalty + at, mask=counted, other=0.0)
        usable = tl.minimum(usable, tl.min(tl.where(tl.abs(cost) < infinity, 1, 0)))
        advantage -= cost

    remaining = tl.where(counted, advantage, float("-inf"))
    best = tl.max(remaining)
    kept = best
    for _ in range(1, min_keep):
        first = tl.min(tl.where(remaining == kept, at, 0x7FFFFFFFFFFFFFFF))
        remaining = tl.where(at == first, float("-inf"), remaining)
        kept = tl.max(remaining)
    least = tl.minimum(best - tl.load(margin + row * margin_stride), kept)

    weight = tl.load(beta + row * beta_stride)
    moved = counted & (tl.zeros_like(advantage) + weight != 0.0)
    shifted = tl.where(moved, (own.to(tl.float32) + weight * advantage).to(own.dtype), own)
    broken = tl.where(tl.abs(shifted.to(tl.float32)) < infinity, 0, 2)
    broken = tl.where(moved & (tl.abs(own.to(tl.float32)) < infinity), broken, 0)
    failed = tl.where(usable != 0, tl.max(broken), 1)
    guided = tl.where(counted & (advantage < least), float("-inf"), shifted)
    return tl.where(failed != 0, own, guided), failed
