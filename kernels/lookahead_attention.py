# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of a packed forward: candidates and new prefix tokens over prefixes in a slot pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu
from guided_decode.kernels.lookahead_tiles import splits_of, tile_of
from guided_decode.kernels.merge_splits import merge_splits_triton

if TYPE_CHECKING:
    import triton.language as tl

# The reference's queries at once, which bounds its scores.
_CHUNK = 128
_NO_WINDOW = 1 << 30


class PackedReads(NamedTuple):
    """What the queries of a packed forward read, as lookahead_attention takes it."""

    keys: Tensor
    values: Tensor
    table: Tensor
    segments: Tensor
    positions: Tensor
    slots: Tensor
    scaling: float
    window: int | None
    softcap: float | None


def lookahead_attention(
    query: Tensor,  # [tokens, heads, head_dim] any float
    keys: Tensor,  # [capacity, kv_heads, head_dim] of query's dtype
    values: Tensor,  # [capacity, kv_heads, value_dim] of query's dtype
    table: Tensor,  # [rows, width] int32
    segments: Tensor,  # [n, 3] int32
    positions: Tensor,  # [tokens] int64
    slots: Tensor,  # [tokens] int64
    *,
    scaling: float,
    max_queries: int,
    max_prefix: int,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of each token to its row's prefix and to itself.

    Query t of a segment whose slots are S = table[row], at position p = positions[t], sees p + 1
    keys: those in S[0], …, S[p − 1], and its own in slots[t]. So a candidate (p is the prefix's
    length) sees the prefix and itself and no other candidate; a new prefix token sees what is
    cached, the tokens that come with it before itself, and itself. This forward's keys and values
    are in the pool already.

        score = scaling · q · k;  softcap · tanh(score / softcap) where softcap is given
        output = softmax over the keys that are seen of score · v

    Under a window only the keys of the last `window` positions are seen, p itself among them.

    Args:
        query: [tokens, heads, head_dim]; heads is a multiple of kv_heads, and neighbouring heads
            share theirs.
        keys, values: the pool of one layer, a slot a token.
        table: int32 [rows, width], a row's slot of each position.
        segments: int32 [n, 3]: first token, number of tokens, row of the table. A token is in one
            at most; an empty segment is padding, and so is a token in none, whose output is not
            defined.
        positions: int64 [tokens]; -1 is padding, whose output is 0 and whose slot is not read.
        slots: int64 [tokens], each token's own.
        scaling: of the scores.
        max_queries: at least the tokens of any segment.
        max_prefix: at least the largest position. These two size the launch: with a CUDA graph
            they are its bucket's, and every tensor may change under it.
        window: positions that are seen, or None.
        softcap: or None.

    Returns:
        [tokens, heads, value_dim] of query's dtype.

    Raises:
        ValueError: heads is not a multiple of kv_heads, or query's and keys' head_dim differ.
    """
    if query.shape[1] % keys.shape[1] or query.shape[2] != keys.shape[2]:
        raise ValueError(
            f"query came with heads and head_dim {list(query.shape[1:])}, the pool with "
            f"{list(keys.shape[1:])}: expected a multiple of the pool's heads, and its head_dim"
        )
    reads = PackedReads(keys, values, table, segments, positions, slots, scaling, window, softcap)
    if on_gpu(query) and tile_of(query, values, max_queries) is not None:
        return lookahead_attention_triton(query, reads, max_queries, max_prefix)
    return lookahead_attention_reference(query, reads)


def lookahead_attention_reference(query: Tensor, reads: PackedReads) -> Tensor:
    """The specification of `lookahead_attention`, and what a CPU runs.

    Heads of a group share one product with their keys, which are never repeated; a segment's
    prefix is read once for up to 128 of its queries.
    """
    output = query.new_zeros(*query.shape[:2], reads.values.shape[2])
    for start, count, row in reads.segments.tolist():
        for first in range(start, start + count, _CHUNK):
            queries = slice(first, min(first + _CHUNK, start + count))
            output[queries] = _attend(query[queries], reads, queries, row)
    return output


def _attend(query: Tensor, reads: PackedReads, queries: slice, row: int) -> Tensor:
    """The outputs of neighbouring queries of one segment: [n, heads, value_dim]."""
    n, heads, head_dim = query.shape
    kv_heads = reads.keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    position = reads.positions[queries]
    columns, low = _prefix_slots(position, reads, row)
    own = reads.slots[queries].clamp(min=0)

    q = query.to(dtype).view(n, kv_heads, heads // kv_heads, head_dim) * reads.scaling
    rows = q.transpose(0, 1).reshape(kv_heads, -1, head_dim)
    scores = torch.bmm(rows, _pool_rows(reads.keys, columns, dtype).permute(1, 2, 0))
    itself = (q * reads.keys[own].to(dtype)[:, :, None]).sum(-1)
    itself = itself.transpose(0, 1).reshape(kv_heads, -1, 1)
    weights = _softmax(scores, itself, _hidden(position, columns, low, reads), reads.softcap)

    output = torch.bmm(weights[..., :-1], _pool_rows(reads.values, columns, dtype).transpose(0, 1))
    output = output.view(kv_heads, n, heads // kv_heads, -1).transpose(0, 1)
    share = weights[..., -1].view(kv_heads, n, -1, 1).transpose(0, 1)
    output = output + share * reads.values[own].to(dtype)[:, :, None]
    output = output.masked_fill((position < 0)[:, None, None, None], 0.0)
    return output.reshape(n, heads, -1).to(query.dtype)


def _prefix_slots(position: Tensor, reads: PackedReads, row: int) -> tuple[Tensor, int]:
    """Slots of the positions that any of the queries sees, and the first of these positions."""
    lowest = position.masked_fill(position < 0, int(position.max())).min()
    low = 0 if reads.window is None else max(0, int(lowest) - reads.window + 1)
    return reads.table[row, low : max(low, int(position.max()))].long(), low


def _pool_rows(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """pool[slots] in a dtype; neighbouring slots are not copied where that is the pool's."""
    n = len(slots)
    if n and int(slots[-1]) - int(slots[0]) == n - 1 and bool((slots.diff() == 1).all()):
        return pool[int(slots[0]) : int(slots[0]) + n].to(dtype)
    return pool.index_select(0, slots).to(dtype)


def _hidden(position: Tensor, slots: Tensor, low: int, reads: PackedReads) -> Tensor | None:
    """bool [n, columns], what a query does not see; None where each sees all."""
    if bool((position == position[0]).all()):
        return None
    column = low + torch.arange(len(slots), device=slots.device)
    hidden = column >= position[:, None]
    if reads.window is not None:
        hidden |= column <= position[:, None] - reads.window
    return hidden


def _softmax(
    scores: Tensor,  # [kv_heads, n · group, columns]
    itself: Tensor,  # [kv_heads, n · group, 1]
    hidden: Tensor | None,  # [n, columns] bool
    softcap: float | None,
) -> Tensor:
    """Weights of the columns, and last of the query itself: [kv_heads, n · group, columns + 1]."""
    scores = torch.cat([scores, itself], -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden is not None:
        group = scores.shape[1] // len(hidden)
        scores[..., :-1].masked_fill_(hidden.repeat_interleave(group, 0), -torch.inf)
    return scores.softmax(-1)


def lookahead_attention_triton(
    query: Tensor, reads: PackedReads, max_queries: int, max_prefix: int
) -> Tensor:
    """The same on a GPU, in one launch, or two where the prefix is split.

    The unfused way copies a row's prefix from the pool for each of its k candidates and attends
    for each: k · length · kv_heads · (head_dim + value_dim) · itemsize bytes, three times (read,
    written, read), in 6 or more launches. This reads them once for all the queries of a tile
    (all k candidates while k · group ≤ 64 in 16 bits; further tiles find them in the cache), with
    no copy, and moves 8 · heads · value_dim bytes more a query and split for the merge.
    """
    tile = tile_of(query, reads.values, max_queries)
    assert tile is not None
    if query.stride(-1) != 1:
        query = query.contiguous()
    tokens, heads, head_dim = query.shape
    kv_heads, value_dim = reads.values.shape[1:]
    group = heads // kv_heads
    tiles = -(-max_queries // (tile.m // group))
    splits = splits_of(len(reads.segments) * tiles * kv_heads, max_prefix)
    output = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    partial, lse = output, None
    if splits > 1:
        partial = torch.empty(splits, *output.shape, dtype=torch.float32, device=query.device)
        lse = torch.empty(splits, tokens, heads, dtype=torch.float32, device=query.device)
    _attend_kernel.launch(
        (len(reads.segments) * tiles, kv_heads, splits),
        query,
        reads.keys,
        reads.values,
        reads.table,
        reads.segments.contiguous(),
        reads.positions,
        reads.slots,
        partial,
        lse,
        reads.scaling,
        reads.softcap,
        _NO_WINDOW if reads.window is None else reads.window,
        group,
        tiles,
        tokens,
        # The stride of a single token says nothing, and may compile another kernel.
        query.stride(0) if tokens > 1 else heads * head_dim,
        query.stride(1),
        *reads.keys.stride()[:2],
        *reads.values.stride()[:2],
        reads.table.stride(0),
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=next_power_of_two(max(head_dim, 16)),
        BLOCK_V=next_power_of_two(max(value_dim, 16)),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        PLAIN=tile.plain,
        MASKED_STAGES=1 if tile.plain else tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output if lse is None else merge_splits_triton(partial, lse, output)


@kernel()
def _absorb(
    q, highest, mass, total, slot, seen, keys, values, scaling, softcap,
    key_stride, value_stride, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Takes some keys into a running softmax: slot is [N], seen is [M, N], q is [M, BLOCK_D].

    seen: None where every row sees every key; else a slot below 0 is none.
    highest, mass: float32 [M], the largest score and Σ 2 ** (score − highest), scores in bits: of
    log₂, which the hardware has. total: [M, BLOCK_V].
    """
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    key_mask = d[:, None] < HEAD_DIM
    value_mask = v[None, :] < VALUE_DIM
    if seen is not None:
        live = slot >= 0
        slot = tl.where(live, slot, 0)
        key_mask = key_mask & live[None, :]
        value_mask = value_mask & live[:, None]
    slot = slot.to(tl.int64)
    key = tl.load(keys + slot[None, :] * key_stride + d[:, None], mask=key_mask, other=0.0)
    score = tl.dot(q, key, input_precision="ieee")
    if softcap is not None:
        # tanh(x) = 1 − 2 / (exp(2x) + 1)
        score = softcap * (1.0 - 2.0 / (tl.exp(score * (2.0 * scaling / softcap)) + 1.0))
        score *= 1.4426950408889634
    else:
        score *= scaling * 1.4426950408889634
    if seen is not None:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(highest, tl.max(score, 1))
    # Of what has seen nothing yet, −inf − (−inf) would be NaN.
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(score - finite[:, None])
    decay = tl.exp2(highest - finite)
    mass = mass * decay + tl.sum(weight, 1)
    value = tl.load(values + slot[:, None] * value_stride + v[None, :], mask=value_mask, other=0.0)
    total = tl.dot(weight.to(value.dtype), value, total * decay[:, None], input_precision="ieee")
    return higher, mass, total


@kernel(do_not_specialize=("window", "group", "tiles", "tokens", "table_stride"))
def _attend_kernel(
    query,
    keys,
    values,
    table,
    segments,
    positions,
    slots,
    output,
    lse,
    scaling,
    softcap,
    window,
    group,
    tiles,
    tokens,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLAIN: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):
    """One program: some queries of a segment, the query heads of one group, a part of the prefix.

    Row m of its tile is query m // group and head m % group. The first part takes each query's
    own key as well. With lse the output is the part's own, in float32, for merge_splits.
    PLAIN: columns that all queries see have a loop of their own, without masks.
    """
    segment = segments + (tl.program_id(0) // tiles) * 3
    begin = (tl.program_id(0) % tiles) * (BLOCK_M // group)
    count = tl.minimum(tl.load(segment + 1) - begin, BLOCK_M // group)
    if count <= 0:
        return
    start = tl.load(segment) + begin
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    keys += kv_head * key_head_stride
    values += kv_head * value_head_stride

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = m < count * group
    token = start + m // group
    head = kv_head * group + m % group
    position = tl.load(positions + token, mask=inside, other=-1).to(tl.int32)
    at = token.to(tl.int64) * query_stride + head * query_head_stride
    q = tl.load(
        query + at[:, None] + d[None, :],
        mask=(position >= 0)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if split == 0:
        for first in tl.range(0, count, BLOCK_N, num_stages=1):
            own = first + n
            slot = tl.load(slots + start + own, mask=own < count, other=-1)
            seen = (own[None, :] == (m // group)[:, None]) & (position >= 0)[:, None]
            highest, mass, total = _absorb(
                q, highest, mass, total, slot, seen, keys, values, scaling, softcap,
                key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
            )  # fmt: skip

    high = tl.max(position)
    lowest = tl.min(tl.where(position >= 0, position, high))
    # From here all queries see a column, up to the lowest of their positions.
    common = high - window + 1
    low = tl.maximum(lowest - window + 1, 0)
    part = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(2)), BLOCK_N) * BLOCK_N
    low += split * part
    high = tl.minimum(high, low + part)
    before = tl.cdiv(tl.maximum(tl.minimum(common, high) - low, 0), BLOCK_N)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    table += tl.load(segment + 2).to(tl.int64) * table_stride
    whole = 0
    if PLAIN:
        whole = tl.maximum(tl.minimum(lowest, high) - low - before * BLOCK_N, 0) // BLOCK_N
        for block in range(before, before + whole):
            slot = tl.load(table + low + block * BLOCK_N + n)
            highest, mass, total = _absorb(
                q, highest, mass, total, slot, None, keys, values, scaling, softcap,
                key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
            )  # fmt: skip
    # The others: where a window begins, and the last ones.
    for block in tl.range(0, blocks - whole, num_stages=MASKED_STAGES):
        column = low + tl.where(block < before, block, block + whole) * BLOCK_N + n
        slot = tl.load(table + column, mask=column < high, other=-1)
        behind = position[:, None] - column[None, :]
        seen = (behind > 0) & (behind < window) & (column < high)[None, :]
        highest, mass, total = _absorb(
            q, highest, mass, total, slot, seen, keys, values, scaling, softcap,
            key_stride, value_stride, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    v = tl.arange(0, BLOCK_V)
    place = token.to(tl.int64) * tl.num_programs(1) * group + head
    # Padding has taken keys in as well.
    mass = tl.where(position >= 0, mass, 0.0)
    total = tl.where(mass[:, None] > 0.0, total / mass[:, None], 0.0)
    if lse is not None:
        place += split * tokens.to(tl.int64) * tl.num_programs(1) * group
        tl.store(lse + place, (highest + tl.log2(mass)) * 0.6931471805599453, mask=inside)
    tl.store(
        output + place[:, None] * VALUE_DIM + v[None, :], total.to(output.dtype.element_ty),
        mask=inside[:, None] & (v < VALUE_DIM)[None, :],
    )  # fmt: skip
