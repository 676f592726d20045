# mypy: allow-untyped-defs, allow-incomplete-defs
"""Guidance on the logits: advantages of the candidates, the rule, and the tail, in place."""

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
from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_V = 4096


def guide_logits(
    logits: Tensor,  # [rows, vocab] any float, changed in place
    candidates: Tensor,  # [rows, k] int64, -1 where padded
    values: Tensor,  # [rows, k] float32
    baseline: Tensor,  # [rows] float32
    *,
    beta: Tensor,  # [rows] float32
    margin: Tensor,  # [rows] float32
    keep_tail: Tensor,  # [rows] bool
    mean_baseline: Tensor,  # [rows] bool
    scored: Tensor,  # [rows, k] bool
    penalty: Tensor | None = None,  # [rows, k] float32
    min_keep: int = 1,
) -> Tensor:
    """Rewrites each row's logits by its candidates' advantages.

    With S the scored candidates of a row and C all of them:

        base  = mean over S of values           where mean_baseline, else baseline
        A(a)  = values(a) − base − penalty(a)   for a in S;  0 for the rest of C
        l'(a) = l(a) + beta · A(a)              for a in C,
                −inf where a in S and A(a) < max over S of A − margin, unless A(a) is among
                the min_keep largest of S
        l'(a) = l(a) where keep_tail, else −inf outside C

    "reweight" is margin = inf, "prune" is beta = 0. A candidate that is not scored (a terminal
    under the "baseline" rule, every candidate of a gated row) is neither shifted nor pruned, and
    its logit keeps its bits. A row without candidates is all tail: with keep_tail it is the
    sentinel row of a CUDA graph, which nothing touches.

    Args:
        logits: [rows, vocab], changed in place; the arithmetic is float32.
        candidates: int64 [rows, k], distinct within a row, padded with -1.
        values: float32 [rows, k]; read where scored.
        baseline: float32 [rows].
        beta: float32 [rows].
        margin: float32 [rows], inf for no pruning.
        keep_tail: bool [rows].
        mean_baseline: bool [rows].
        scored: bool [rows, k].
        penalty: float32 [rows, k], kl_coef · (log π − log π_ref), or None.
        min_keep: how many scored candidates of a row pruning leaves at least.

    Returns:
        logits.
    """
    shift = Shift(
        candidates, values, baseline, beta, margin, mean_baseline, scored, penalty, min_keep
    )
    if on_gpu(logits) and 0 < candidates.shape[-1] <= MAX_CANDIDATES:
        return guide_logits_triton(logits, shift, keep_tail)
    return guide_logits_reference(logits, shift, keep_tail)


def guide_logits_reference(logits: Tensor, shift: Shift, keep_tail: Tensor) -> Tensor:
    """The specification of `guide_logits`."""
    # Padding repeats the row's first candidate, so that one scatter serves ragged rows.
    valid = shift.candidates >= 0
    first = valid.int().argmax(-1, keepdim=True)
    index = torch.where(valid, shift.candidates, shift.candidates.gather(-1, first)).clamp(min=0)
    own = logits.gather(-1, index)
    guided = candidate_logits(own, shift)
    guided = torch.where(valid, guided, guided.gather(-1, first))
    # A row without candidates has only a tail.
    guided = torch.where(valid.any(-1, keepdim=True), guided, own)
    guided = guided.masked_fill(~(valid.any(-1) | keep_tail)[:, None], -torch.inf)

    logits.masked_fill_(~keep_tail[:, None], -torch.inf)
    return logits.scatter_(-1, index, guided)


def guide_logits_triton(logits: Tensor, shift: Shift, keep_tail: Tensor) -> Tensor:
    """The same on a GPU, in one launch.

    Unfused: 40 launches, all but one over [rows, k], and masked_fill_, which reads and writes
    2 · rows · vocab · itemsize bytes, whatever the tail. This writes rows · vocab · itemsize bytes
    under tail="mask" and none of the tail under "keep", and reads about 25 bytes a candidate.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // _BLOCK_V)
    _guide_logits_kernel.launch(
        (rows, blocks),
        logits,
        keep_tail,
        *shift.arguments(),
        vocab,
        logits.stride(0),
        logits.stride(1),
        keep_tail.stride(0),
        BLOCK_V=_BLOCK_V,
        BLOCK_K=next_power_of_two(shift.candidates.shape[-1]),
        num_warps=4,
    )
    return logits


@kernel(do_not_specialize=("k", "min_keep"))
def _guide_logits_kernel(
    logits,
    keep_tail,
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
    vocab,
    row_stride,
    token_stride,
    keep_stride,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program writes BLOCK_V tokens of a row, and reads no logit that another one writes."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    offsets = tl.arange(0, BLOCK_K)
    token = tl.load(candidates + row * k + offsets, mask=offsets < k, other=-1)
    mine = (token >= start) & (token < start + BLOCK_V)
    logits += row * row_stride
    own = tl.load(logits + token * token_stride, mask=mine, other=0.0)
    guided = shift_candidates(
        own, token, row, values, scored, penalty, baseline, beta, margin, mean_baseline,
        baseline_stride, beta_stride, margin_stride, mean_stride, k, min_keep, BLOCK_K,
    )  # fmt: skip
    # The candidates' logits are read before the tail is written, and written after it.
    tl.debug_barrier()
    if tl.load(keep_tail + row * keep_stride) == 0:
        tail = start + tl.arange(0, BLOCK_V).to(tl.int64)
        hidden = tl.full([BLOCK_V], float("-inf"), logits.dtype.element_ty)
        tl.store(logits + tail * token_stride, hidden, mask=tail < vocab)
    tl.debug_barrier()
    tl.store(logits + token * token_stride, guided, mask=mine)
