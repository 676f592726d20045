"""lookahead_attention on a pool of scattered slots, beside torch's and FlashInfer's attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.floors import Size
from benchmarks.gpu.timing import rotations
from guided_decode.kernels.lookahead_attention import (
    PackedReads,
    lookahead_attention_reference,
    lookahead_attention_triton,
)


def attention_case(
    made: Callable[..., Any],
    size: Size,
    batch: int,
    k: int,
    prefix: int,
    device: str,
    dtype: torch.dtype,
    *,
    target: bool = False,
) -> Any:
    """A case of k candidates over each of `batch` prefixes, in one layer of a model.

    made: what makes the case of its fields.
    """
    row_bytes = 2 * size.kv_heads * size.head_dim * dtype.itemsize
    queries = batch * k * size.heads * size.head_dim * dtype.itemsize
    moved = batch * (prefix + k) * row_bytes + 2 * queries
    sets = rotations(moved, most=24)
    inputs = [_inputs(size, batch, k, prefix, i, sets, device) for i in range(sets)]
    slots = sets * batch * (prefix + k)
    keys, values = (
        torch.randn(slots, size.kv_heads, size.head_dim, device=device, dtype=dtype)
        for _ in range(2)
    )
    query = torch.randn(batch * k, size.heads, size.head_dim, device=device, dtype=dtype)
    reads = [PackedReads(keys, values, *each, size.head_dim**-0.5, None, None) for each in inputs]

    def truth() -> Tensor:
        exact = reads[0]._replace(keys=keys.float(), values=values.float())
        return lookahead_attention_reference(query.float(), exact)

    return made(
        "lookahead_attention",
        f"{size.name} shape, batch {batch}, k {k}, prefix {prefix}",
        moved,
        [lambda r=r: lookahead_attention_triton(query, r, k, prefix) for r in reads],
        [lambda r=r: gathered_attention(query, r, batch, k, prefix) for r in reads],
        truth,
        target=target,
        others={"FlashInfer (prefix only)": lambda: _flashinfer(query, reads, k, prefix)},
    )


def _inputs(
    size: Size, batch: int, k: int, prefix: int, index: int, sets: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Table, segments, positions and slots of one input set: its own part of the pool, shuffled."""
    tokens = batch * (prefix + k)
    generator = torch.Generator().manual_seed(index)
    own = (torch.randperm(tokens, generator=generator) + index * tokens).view(batch, prefix + k)
    row = torch.arange(batch)
    segments = torch.stack([row * k, torch.full_like(row, k), row], 1).int()
    positions = torch.full((batch * k,), prefix)
    found = own[:, :prefix].int().contiguous(), segments, positions, own[:, prefix:].flatten()
    table, segments, positions, slots = (tensor.to(device) for tensor in found)
    return table, segments, positions, slots


def gathered_attention(
    query: Tensor, reads: PackedReads, batch: int, k: int, prefix: int
) -> Tensor:
    """torch's way: a row's keys gathered once for its candidates, and attention under a mask."""
    every = torch.cat([reads.table.long(), reads.slots.view(batch, k)], 1)
    keys, values = (pool[every].transpose(1, 2) for pool in (reads.keys, reads.values))
    own = torch.eye(k, dtype=torch.bool, device=query.device)
    mask = F.pad(own, (prefix, 0), value=True)
    q = query.view(batch, k, *query.shape[1:]).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=reads.scaling, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(batch * k, query.shape[1], -1)


def _flashinfer(
    query: Tensor, reads: list[PackedReads], k: int, prefix: int
) -> list[Callable[[], object]]:
    """FlashInfer's paged attention with pages of one token, over the prefix alone.

    Raises ImportError where it is not installed.
    """
    import flashinfer

    calls = []
    for each in reads:
        batch = len(each.segments)
        counts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        space = torch.empty(64 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        wrapper.plan(
            counts * k,
            counts * prefix,
            each.table.flatten().contiguous(),
            torch.ones(batch, dtype=torch.int32, device=query.device),
            query.shape[1],
            each.keys.shape[1],
            query.shape[2],
            1,
            causal=False,
            sm_scale=each.scaling,
            q_data_type=query.dtype,
            kv_data_type=query.dtype,
        )
        pools = each.keys[:, None], each.values[:, None]
        calls.append(lambda w=wrapper, kv=pools: w.run(query, kv))
    return calls
