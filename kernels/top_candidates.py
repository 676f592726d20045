# mypy: allow-untyped-defs, allow-incomplete-defs
"""Each row's candidates out of the vocabulary: top-k, top-p, and the gate, in two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel, on_gpu
from guided_decode.kernels.largest_keys import best_of, members_of, places_of

if TYPE_CHECKING:
    import triton.language as tl

# What one program does not sort goes to the reference.
MAX_WIDTH = 64
MAX_VOCAB = 1 << 20

# A group is 32 tokens; a block, a program of the first launch, is 32 groups.
_LOG_GROUP = 5
# The second launch is compiled for widths up to 16, 32 and 64, and for no other: widths are the
# requests' own, and a variant takes seconds.
_LEAST_LOG_K = 4
# The stride of a bound that is not given.
_NONE = -1


class TopCandidates(NamedTuple):
    """candidates: int64 [rows, width], padded with -1. gated: bool [rows], or None without gate."""

    candidates: Tensor
    gated: Tensor | None


class Cut(NamedTuple):
    """What bounds the candidates of a row, as top_candidates takes it.

    top_k: int64 [rows] or None. top_p, gate: float32 [rows] or None.
    """

    width: int
    top_k: Tensor | None
    top_p: Tensor | None
    gate: Tensor | None
    min_keep: int


def top_candidates(
    logits: Tensor,  # [rows, vocab] any float
    width: int,
    *,
    top_k: Tensor | None = None,  # [rows] int64
    top_p: Tensor | None = None,  # [rows] float32
    gate: Tensor | None = None,  # [rows] float32
    min_keep: int = 1,
) -> TopCandidates:
    """Chooses each row's candidates, by logit from the largest.

    With p the full softmax of a row at temperature 1, and a₀, a₁, … its tokens by logit from the
    largest (ties go to the lower token id; −0.0 ties with 0.0):

        candidates[i] = a_i   where i < top_k, l(a_i) > −inf, and
                              p(a₀) + … + p(a_{i−1}) < top_p or i < min_keep
                        -1    elsewhere
        gated         = p(a₀) ≥ gate

    A row that is −inf everywhere (padding of a CUDA graph) has no candidates and is not gated.

    Args:
        logits: [rows, vocab], without NaN, with any strides.
        width: the largest top_k, at least 1 and at most vocab.
        top_k: int64 [rows], or None for width in every row.
        top_p: float32 [rows], inf for no cut (the mass of all may round to 1 before the last), or
            None for none in any row.
        gate: float32 [rows], inf for none, or None for none in any row.
        min_keep: top_p leaves at least so many.

    Returns:
        candidates, int64 [rows, width], padded with -1; gated, bool [rows], or None without gate.
    """
    cut = Cut(width, top_k, top_p, gate, min_keep)
    if on_gpu(logits) and 0 < width <= MAX_WIDTH and logits.shape[-1] <= MAX_VOCAB:
        return top_candidates_triton(logits, cut)
    return top_candidates_reference(logits, cut)


def top_candidates_reference(logits: Tensor, cut: Cut) -> TopCandidates:
    """The specification of `top_candidates`."""
    uncut = cut.top_k is None and cut.top_p is None and cut.gate is None
    if uncut and logits.device.type == "cpu" and cut.width < logits.shape[-1]:
        values, ids = logits.topk(cut.width + 1, dim=-1)
        # The logits may be ones that a caller trains on.
        tops = values.detach().float().numpy()
        # Nothing ties, so nothing that counts is −inf either: torch.topk's order is the right one.
        if (tops[:, 1:] < tops[:, :-1]).all():
            return TopCandidates(ids[:, :-1].contiguous(), None)
    candidates = _largest(logits, cut.width)
    chosen = logits.gather(-1, candidates).float()
    dropped = chosen == -torch.inf
    gated = None
    if cut.top_p is not None or cut.gate is not None:
        mass = (chosen - torch.logsumexp(logits.float(), -1, keepdim=True)).exp()
        if cut.top_p is not None:
            cut_off = mass.cumsum(-1) - mass >= cut.top_p[:, None]
            cut_off[:, : cut.min_keep] = False
            dropped |= cut_off
        if cut.gate is not None:
            gated = mass[:, 0] >= cut.gate
    if cut.top_k is not None:
        dropped |= torch.arange(cut.width, device=logits.device) >= cut.top_k[:, None]
    return TopCandidates(candidates.masked_fill_(dropped, -1), gated)


def _largest(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, int64 [rows, k]: larger first, ties by the lower id."""
    return (_by_repair if logits.device.type == "cpu" else _by_keys)(logits, k)


def _by_keys(logits: Tensor, k: int) -> Tensor:
    """One top-k over integers that order by (logit, −id), so that nothing ties; no host sync."""
    vocab = logits.shape[-1]
    # Adding zero turns −0.0 into 0.0, which must tie with it.
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(vocab, device=logits.device)
    keys = (ordered << 32) + (vocab - 1 - ids)
    return vocab - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _by_repair(logits: Tensor, k: int) -> Tensor:
    """torch.topk, which breaks ties as it likes, and repairs where that shows; 10 times faster."""
    vocab = logits.shape[-1]
    if k == vocab:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    values, ids = logits.topk(k + 1, dim=-1)
    ids, by_id = ids[:, :k].sort(-1)
    order = values[:, :k].gather(-1, by_id).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(-1, order)
    last = values[:, k - 1]
    # −inf may tie as it likes: it is never a candidate.
    for row in ((last == values[:, k]) & (last > -torch.inf)).nonzero().flatten().tolist():
        above = int((values[row] > last[row]).sum())
        tied = (logits[row] == last[row]).nonzero().flatten()
        ids[row, above:] = tied[: k - above]
    return ids


def top_candidates_triton(logits: Tensor, cut: Cut) -> TopCandidates:
    """The same on a GPU, in two launches.

    The vocabulary is cut into groups of 32 tokens, and these into blocks of 32. A row's K first
    candidates lie in its K first groups, ordered by their largest logit and then by id: each of
    these has a token that precedes all of any other group. Those groups lie in its K first blocks
    for the same reason. So the first launch takes the largest logit of each group and block, and
    the second one sorts no more than the blocks, the groups of K of them, and the tokens of K of
    those: 1150 numbers of a vocabulary of 128256 where K is 16.

    Which bounds are given changes nothing of what is compiled: a batch has those of any of its
    requests.

    Unfused: a dozen launches over the vocabulary in int64, some 100 bytes a token, and those of
    torch.topk; with top_p or gate a logsumexp's 5 over it; and a dozen over [rows, width]. This
    reads itemsize bytes a token and writes an eighth of one, and then reads 32 · (4 + itemsize)
    bytes a candidate.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // (1 << 2 * _LOG_GROUP))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    group_tops = empty(rows, blocks << _LOG_GROUP)
    block_tops = empty(rows, blocks)
    block_sums = empty(rows, blocks)
    candidates = empty(rows, cut.width, dtype=torch.int64)
    gated = empty(rows, dtype=torch.bool)
    _tops_kernel.launch(
        (rows, blocks),
        logits,
        group_tops,
        block_tops,
        block_sums,
        vocab,
        logits.stride(0),
        logits.stride(1),
        LOG_GROUP=_LOG_GROUP,
        num_warps=4,
    )
    log_k = max(_LEAST_LOG_K, (cut.width - 1).bit_length())
    log_blocks = max(log_k + 1, (blocks - 1).bit_length())
    most_keys = 1 << max(log_blocks, log_k + _LOG_GROUP)
    _choose_kernel.launch(
        (rows,),
        logits,
        group_tops,
        block_tops,
        block_sums,
        candidates,
        gated,
        # In the place of a bound that is not given, any tensor of its dtype.
        candidates if cut.top_k is None else cut.top_k,
        block_sums if cut.top_p is None else cut.top_p,
        block_sums if cut.gate is None else cut.gate,
        vocab,
        cut.width,
        cut.min_keep,
        logits.stride(0),
        logits.stride(1),
        *(_NONE if b is None else b.stride(0) for b in (cut.top_k, cut.top_p, cut.gate)),
        LOG_K=log_k,
        LOG_GROUP=_LOG_GROUP,
        LOG_BLOCKS=log_blocks,
        # With more than 4 keys a thread some variants spill; the largest of all, with more than 2.
        num_warps=max(4, most_keys // (128 if log_k + log_blocks < 16 else 64)),
    )
    return TopCandidates(candidates, None if cut.gate is None else gated)


@kernel()
def _tops_kernel(
    logits,
    group_tops,
    block_tops,
    block_sums,
    vocab,
    row_stride,
    token_stride,
    LOG_GROUP: tl.constexpr,
):
    """One program takes a block's largest logit, its groups', and its Σ exp(logit − largest)."""
    row = tl.program_id(0).to(tl.int64)
    block = row * tl.num_programs(1) + tl.program_id(1)
    inside = tl.arange(0, 1 << LOG_GROUP)
    group = (tl.program_id(1) << LOG_GROUP) + inside
    token = (group[:, None] << LOG_GROUP) + inside[None, :]
    at = logits + row * row_stride + token.to(tl.int64) * token_stride
    logit = tl.load(at, mask=token < vocab, other=float("-inf")).to(tl.float32)
    tops = tl.max(logit, 1)
    tl.store(group_tops + (block << LOG_GROUP) + inside, tops)
    top = tl.max(tops)
    tl.store(block_tops + block, top)
    above = tl.maximum(top, -3.4028234663852886e38)
    tl.store(block_sums + block, tl.sum(tl.exp(logit - above)))


@kernel(
    do_not_specialize=("width", "min_keep", "top_k_stride", "top_p_stride", "gate_stride"),
    any_alignment=("top_k", "top_p", "gate"),
)
def _choose_kernel(
    logits,
    group_tops,
    block_tops,
    block_sums,
    candidates,
    gated,
    top_k,
    top_p,
    gate,
    vocab,
    width,
    min_keep,
    row_stride,
    token_stride,
    top_k_stride,
    top_p_stride,
    gate_stride,
    LOG_K: tl.constexpr,
    LOG_GROUP: tl.constexpr,
    LOG_BLOCKS: tl.constexpr,
):
    """One program chooses a row's blocks, groups of these, and tokens of those: the candidates.

    Of a bound whose stride is negative nothing is read.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(vocab, 1 << LOG_GROUP)
    blocks = tl.cdiv(groups, 1 << LOG_GROUP)
    block_tops += row * blocks
    block = tl.arange(0, 1 << LOG_BLOCKS).to(tl.int64)
    known = block < blocks
    tops = tl.load(block_tops + block, mask=known, other=float("-inf"))
    sums = tl.load(block_sums + row * blocks + block, mask=known, other=0.0)
    # −inf − (−inf) would be NaN.
    top = tl.maximum(tl.max(tops), -3.4028234663852886e38)
    total = tl.sum(sums * tl.exp(tops - top))
    best = best_of(block_tops, block, 1, blocks, LOG_BLOCKS, LOG_K)
    group = members_of(best, LOG_GROUP)
    group_tops += row * (blocks << LOG_GROUP)
    best = best_of(group_tops, group, 1, groups, LOG_K + LOG_GROUP, LOG_K)
    token = members_of(best, LOG_GROUP)
    logits += row * row_stride
    best = best_of(logits, token, token_stride, vocab, LOG_K + LOG_GROUP, LOG_K)

    ordered = (best >> 32).to(tl.int32)
    place = tl.arange(0, 1 << LOG_K)
    kept = ordered > -0x7F800000  # what −inf is
    bits = tl.where(ordered < 0, -ordered ^ -0x80000000, ordered)
    below = tl.where(kept, bits.to(tl.float32, bitcast=True) - top, float("-inf"))
    # A row at −inf everywhere has no total.
    mass = tl.exp(below) / tl.where(total == 0.0, 1.0, total)
    least = tl.load(gate + row * gate_stride, mask=gate_stride >= 0, other=float("inf"))
    reached = (place == 0) & kept & (mass >= least)
    tl.store(gated + row, tl.max(reached.to(tl.int32)) != 0)
    most = tl.load(top_p + row * top_p_stride, mask=top_p_stride >= 0, other=float("inf"))
    enough = tl.cumsum(mass, 0) - mass >= most
    kept &= (place < min_keep) | (enough ^ True)
    kept &= place < tl.load(top_k + row * top_k_stride, mask=top_k_stride >= 0, other=width)
    chosen = tl.where(kept, places_of(best), -1)
    tl.store(candidates + row * width + place, chosen, mask=place < width)
