# mypy: allow-untyped-defs, allow-incomplete-defs
"""Queries and keys turned by their positions, keys and values put into their slots: one launch.

Rotary position embeddings (Su et al., arXiv 2104.09864) in the half-split form of transformers: of
a head's first R elements, x_i and x_{i + R/2} turn together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel, next_power_of_two, on_gpu
from guided_decode.kernels.rounded_norm import RoundedNorm

if TYPE_CHECKING:
    import triton.language as tl


class Heads(NamedTuple):
    """What a layer's products gave: [tokens, heads, dim] of one float dtype, dense in a token.

    key, value: [tokens, kv_heads, dim]; value's dim may be another.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Turn(NamedTuple):
    """cos, sin: [tokens, R] of the heads' dtype, R even, at most their dim; both halves alike.

    query_norm, key_norm: of each head before it turns, as Qwen 3 and Gemma 3 have it; both or none,
    and alike but for their weights.
    """

    cos: Tensor
    sin: Tensor
    query_norm: RoundedNorm | None = None
    key_norm: RoundedNorm | None = None


class Slots(NamedTuple):
    """keys, values: [capacity, kv_heads, dim], a layer's. at: int64 [tokens], where each goes."""

    keys: Tensor
    values: Tensor
    at: Tensor


def rotary_slots(heads: Heads, turn: Turn, slots: Slots) -> Tensor:
    """Writes the turned keys and the values into their slots.

    A slot that several tokens name gets one of them.

    Returns:
        The turned queries, [tokens, heads, dim], contiguous.
    """
    if on_gpu(heads.query, turn.cos):
        return rotary_slots_triton(heads, turn, slots)
    return rotary_slots_reference(heads, turn, slots)


def rotary_slots_reference(heads: Heads, turn: Turn, slots: Slots) -> Tensor:
    """The specification of `rotary_slots`: the operations of transformers, in their order."""
    slots.keys.index_copy_(0, slots.at, _turned(heads.key, turn.key_norm, turn))
    slots.values.index_copy_(0, slots.at, heads.value)
    return _turned(heads.query, turn.query_norm, turn).contiguous()


def _turned(x: Tensor, norm: RoundedNorm | None, turn: Turn) -> Tensor:
    if norm is not None:
        x = norm.reference(x)
    size = turn.cos.shape[-1]
    x, rest = x[..., :size], x[..., size:]
    crossed = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    x = x * turn.cos[:, None] + crossed * turn.sin[:, None]
    return torch.cat([x, rest], -1) if rest.shape[-1] else x


def rotary_slots_triton(heads: Heads, turn: Turn, slots: Slots) -> Tensor:
    """The same on a GPU; unfused, 12 launches, and 16 more for the norms of heads."""
    query, key, value = (each if _is_dense(each) else each.contiguous() for each in heads)
    tokens, n, dim = query.shape
    kv_heads, value_dim = value.shape[1:]
    output = torch.empty(tokens, n, dim, dtype=query.dtype, device=query.device)
    norms = turn.query_norm is not None
    # Without norms their arguments are not read.
    query_norm, key_norm = turn.query_norm, turn.key_norm
    _rotary_slots_kernel.launch(
        (tokens, n + kv_heads),
        query,
        key,
        value,
        turn.cos.contiguous(),
        turn.sin.contiguous(),
        query if query_norm is None else query_norm.norm.weight,
        key if key_norm is None else key_norm.norm.weight,
        slots.at,
        output,
        slots.keys,
        slots.values,
        0.0 if query_norm is None else query_norm.norm.eps,
        0.0 if query_norm is None else query_norm.norm.offset,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        HEADS=n,
        KV_HEADS=kv_heads,
        DIM=dim,
        VALUE_DIM=value_dim,
        TURNED=turn.cos.shape[-1],
        NORMS=norms,
        ROUNDS_FIRST=query_norm is not None and query_norm.rounds_first,
        BLOCK=next_power_of_two(max(dim, value_dim)),
        num_warps=1,
    )
    return output


def _is_dense(heads: Tensor) -> bool:
    """Whether each token's heads lie side by side, wherever the tokens lie."""
    return heads.stride(-1) == 1 and (heads.shape[1] == 1 or heads.stride(1) == heads.shape[2])


@kernel(do_not_specialize=("query_stride", "key_stride", "value_stride"),
        any_alignment=("slots",))  # fmt: skip
def _rotary_slots_kernel(
    query,
    key,
    value,
    cos,
    sin,
    query_weight,
    key_weight,
    slots,
    output,
    keys,
    values,
    eps,
    offset,
    query_stride,
    key_stride,
    value_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    NORMS: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program has a token's query head, or its key head and the value's."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    if head < HEADS:
        turned = _turned_head(query + token * query_stride + head * DIM, query_weight,
                              cos + token * TURNED, sin + token * TURNED, at, eps, offset,
                              DIM, TURNED, NORMS, ROUNDS_FIRST)  # fmt: skip
        place = output + (token * HEADS + head) * DIM + at
        tl.store(place, turned.to(output.dtype.element_ty), mask=at < DIM)
    else:
        head -= HEADS
        slot = tl.load(slots + token)
        turned = _turned_head(key + token * key_stride + head * DIM, key_weight,
                              cos + token * TURNED, sin + token * TURNED, at, eps, offset,
                              DIM, TURNED, NORMS, ROUNDS_FIRST)  # fmt: skip
        place = keys + (slot * KV_HEADS + head) * DIM + at
        tl.store(place, turned.to(keys.dtype.element_ty), mask=at < DIM)
        given = tl.load(value + token * value_stride + head * VALUE_DIM + at, mask=at < VALUE_DIM)
        tl.store(values + (slot * KV_HEADS + head) * VALUE_DIM + at, given, mask=at < VALUE_DIM)


@kernel()
def _turned_head(
    head,
    weight,
    cos,
    sin,
    at,
    eps,
    offset,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    NORMS: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    """A head of DIM elements, float32, each operation rounded to the head's dtype."""
    dtype = head.dtype.element_ty
    inside, turns = at < DIM, at < TURNED
    # What turns with each: the element half of TURNED further on, or back.
    other = tl.where(at < TURNED // 2, at + TURNED // 2, at - TURNED // 2)
    x = tl.load(head + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(head + other, mask=turns, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(x * x) / DIM + eps)
        x, y = x * scale, y * scale
        if ROUNDS_FIRST:
            x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
        x *= offset + tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        y *= offset + tl.load(weight + other, mask=turns, other=0.0).to(tl.float32)
        x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
    y = tl.where(at < TURNED // 2, -y, y)
    c = tl.load(cos + at, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=turns, other=0.0).to(tl.float32)
    return (x * c).to(dtype).to(tl.float32) + (y * s).to(dtype).to(tl.float32)
