# mypy: allow-untyped-defs, allow-incomplete-defs
"""What guidance makes of each candidate's logit: shared by guide_logits and guide_sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

# More candidates than one program holds go to the reference.
MAX_CANDIDATES = 1024


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


def candidate_logits(own: Tensor, shift: Shift) -> Tensor:
    """The guided logits of candidates, by guide_logits' formula.

    Args:
        own: [rows, k] any float, their logits; anything where padded.
        shift: what moves them.

    Returns:
        [rows, k] of own's dtype; anything where padded.
    """
    scored = shift.scored & (shift.candidates >= 0)
    quality = shift.values.masked_fill(~scored, 0.0)
    mean = quality.sum(-1) / scored.sum(-1).clamp(min=1)
    advantage = quality - torch.where(shift.mean_baseline, mean, shift.baseline)[:, None]
    if shift.penalty is not None:
        advantage = advantage - shift.penalty
    advantage = advantage.masked_fill(~scored, 0.0)
    kept = min(shift.min_keep, own.shape[-1])
    best = advantage.masked_fill(~scored, -torch.inf).topk(kept).values
    least = torch.minimum(best[:, :1] - shift.margin[:, None], best[:, -1:])
    shifted = (own.float() + shift.beta[:, None] * advantage).to(own.dtype)
    guided = torch.where(scored & (shift.beta != 0)[:, None], shifted, own)
    return guided.masked_fill(scored & (advantage < least), -torch.inf)


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
    """`candidate_logits` of one row: own and token are [BLOCK_K]."""
    at = row * k + tl.arange(0, BLOCK_K)
    counted = tl.load(scored + at, mask=token >= 0, other=0) != 0
    quality = tl.load(values + at, mask=counted, other=0.0)
    count = tl.maximum(tl.sum(counted.to(tl.int32)), 1)
    base = tl.load(baseline + row * baseline_stride)
    if tl.load(mean_baseline + row * mean_stride):
        base = tl.div_rn(tl.sum(quality), count.to(tl.float32))
    advantage = quality - base
    if penalty is not None:
        advantage -= tl.load(penalty + at, mask=counted, other=0.0)

    remaining = tl.where(counted, advantage, float("-inf"))
    best = tl.max(remaining)
    kept = best
    for _ in range(1, min_keep):
        first = tl.min(tl.where(remaining == kept, at, 0x7FFFFFFFFFFFFFFF))
        remaining = tl.where(at == first, float("-inf"), remaining)
        kept = tl.max(remaining)
    least = tl.minimum(best - tl.load(margin + row * margin_stride), kept)

    weight = tl.load(beta + row * beta_stride)
    guided = own
    if weight != 0.0:
        shifted = (own.to(tl.float32) + weight * advantage).to(own.dtype)
        guided = tl.where(counted, shifted, own)
    return tl.where(counted & (advantage < least), float("-inf"), guided)
