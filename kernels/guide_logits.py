# mypy: allow-untyped-defs, allow-incomplete-defs
"""Guidance on the logits: advantages of the candidates, the rule, and the tail."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.candidate_shift import (
    MAX_CANDIDATES,
    Shift,
    candidate_logits,
    reweighted,
    shift_candidates,
)
from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_V = 4096
# Fewer candidates share a compiled kernel: how many there are is the requests' choice.
_LEAST_BLOCK_K = 16


class GuidedLogits(NamedTuple):
    """logits: [rows, vocab]. failed: int32 [rows], why a row has its own logits, or 0.

    candidate_shift.UNUSABLE: a score that counts is NaN or infinite. OVERFLOWED: finite numbers
    gave a logit that its dtype does not hold.
    """

    logits: Tensor
    failed: Tensor


def guide_logits(
    logits: Tensor,  # [rows, vocab] any float
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
    usual: bool = False,
) -> GuidedLogits:
    """Each row's logits, moved by its candidates' advantages.

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
    sentinel row of a CUDA graph, which nothing touches. A row that fails keeps every bit: what is
    not finite in the scores never reaches the logits, and nobody has to look before.

    Args:
        logits: [rows, vocab], not changed; the arithmetic is float32.
        candidates: int64 [rows, k], distinct within a row, padded with -1.
        values: float32 [rows, k]; read where scored.
        baseline: float32 [rows]; read where anything is scored.
        beta: float32 [rows].
        margin: float32 [rows], inf for no pruning.
        keep_tail: bool [rows].
        mean_baseline: bool [rows].
        scored: bool [rows, k].
        penalty: float32 [rows, k], kl_coef · (log π − log π_ref), or None; read where scored.
        min_keep: how many scored candidates of a row pruning leaves at least.
        usual: beta is nowhere 0, margin everywhere inf, mean_baseline and keep_tail nowhere true,
            candidates nowhere padded: what the caller knows without a look at the device. It
            changes cost only.

    Returns:
        New logits of the input's dtype, and which rows failed.
    """
    shift = Shift(
        candidates, values, baseline, beta, margin, mean_baseline, scored, penalty, min_keep
    )
    if on_gpu(logits) and 0 < candidates.shape[-1] <= MAX_CANDIDATES:
        return guide_logits_triton(logits, shift, keep_tail)
    return guide_logits_reference(logits, shift, keep_tail, usual=usual)


def guide_logits_reference(
    logits: Tensor, shift: Shift, keep_tail: Tensor, *, usual: bool = False
) -> GuidedLogits:
    """The specification of `guide_logits`."""
    if usual and shift.penalty is None and logits.device.type == "cpu":
        guided_and_failed = _usual(logits, shift)
        if guided_and_failed is not None:
            return guided_and_failed
    # Padding repeats the row's first candidate, so that one scatter serves ragged rows.
    valid = shift.candidates >= 0
    first = valid.int().argmax(-1, keepdim=True)
    index = torch.where(valid, shift.candidates, shift.candidates.gather(-1, first)).clamp(min=0)
    own = logits.gather(-1, index)
    guided, failed = candidate_logits(own, shift)
    guided = torch.where(valid, guided, guided.gather(-1, first))
    kept = (keep_tail | (failed != 0))[:, None]
    # A row without candidates has only a tail.
    tail = torch.where(kept, own, -torch.inf)
    guided = torch.where(valid.any(-1, keepdim=True), guided, tail)
    return GuidedLogits(torch.where(kept, logits, -torch.inf).scatter_(-1, index, guided), failed)


def _usual(logits: Tensor, shift: Shift) -> GuidedLogits | None:
    """The same of most steps, in a quarter of the operations; None where a row fails.

    It looks at the numbers, which on a GPU would wait for them.
    """
    if not shift.candidates.numel():
        return None
    guided = reweighted(logits.gather(-1, shift.candidates), shift)
    if guided is None:
        return None
    tail = logits.new_full(logits.shape, -torch.inf)
    failed = torch.zeros(len(logits), dtype=torch.int32)
    return GuidedLogits(tail.scatter_(-1, shift.candidates, guided), failed)


def guide_logits_triton(logits: Tensor, shift: Shift, keep_tail: Tensor) -> GuidedLogits:
    """The same on a GPU, in one launch.

    Unfused: some 50 launches, all but one over [rows, k], and torch.where, which reads and writes
    2 · rows · vocab · itemsize bytes, whatever the tail. This writes rows · vocab · itemsize bytes,
    reads as many under tail="keep" and none of the tail under "mask", and reads about 25 bytes a
    candidate.
    """
    rows, vocab = logits.shape
    guided = torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
    failed = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _guide_logits_kernel.launch(
        (rows, -(-vocab // _BLOCK_V)),
        logits,
        guided,
        failed,
        keep_tail,
        *shift.arguments(),
        vocab,
        logits.stride(0),
        logits.stride(1),
        keep_tail.stride(0),
        BLOCK_V=_BLOCK_V,
        BLOCK_K=next_power_of_two(max(shift.candidates.shape[-1], _LEAST_BLOCK_K)),
        num_warps=4,
    )
    return GuidedLogits(guided, failed)


@kernel(do_not_specialize=("k", "min_keep"))
def _guide_logits_kernel(
    logits,
    guided,
    failed,
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
    """One program writes BLOCK_V tokens of a row; all of a row work out its candidates."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    offsets = tl.arange(0, BLOCK_K)
    token = tl.load(candidates + row * k + offsets, mask=offsets < k, other=-1)
    logits += row * row_stride
    own = tl.load(logits + token * token_stride, mask=token >= 0, other=0.0)
    moved, why = shift_candidates(
        own, token, row, values, scored, penalty, baseline, beta, margin, mean_baseline,
        baseline_stride, beta_stride, margin_stride, mean_stride, k, min_keep, BLOCK_K,
    )  # fmt: skip
    tail = start + tl.arange(0, BLOCK_V).to(tl.int64)
    kept = (tl.load(keep_tail + row * keep_stride) != 0) | (why != 0)
    # Of a tail that is masked nothing is read.
    read = tl.where(kept, vocab, 0)
    x = tl.load(logits + tail * token_stride, mask=tail < read, other=float("-inf"))
    guided += row * vocab
    tl.store(guided + tail, x, mask=tail < vocab)
    # The candidates are written over what the tail has in their places.
    tl.debug_barrier()
    tl.store(guided + token, moved, mask=(token >= start) & (token < start + BLOCK_V))
    if tl.program_id(1) == 0:
        tl.store(failed + row, why)
