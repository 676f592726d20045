"""Attention of a packed forward, as a function that unmodified transformers modules call.

A prefix query sees its prefix up to itself; a candidate sees its prefix and itself, and no other
candidate. Keys and values lie in the slot pool; the prefix is read once for all candidates of a
row and for all query heads of a group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from guided_decode.packed import PackedBatch, Segment

ATTENTION_NAME = "guided_decode"

# Arguments that carry no mathematics of their own, or that are already in the packed batch.
_NEUTRAL = frozenset({"position_ids", "use_cache", "cache_position", "return_dict"})


class SlotCache:
    """A cache for transformers' `past_key_values` that writes each token into its slot."""

    def __init__(self, batch: PackedBatch) -> None:
        self._batch = batch

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores key and value, [1, kv_heads, tokens, head_dim], and returns them."""
        pool, slots = self._batch.pool, self._batch.slots
        pool.keys[layer].index_copy_(0, slots, key[0].transpose(0, 1))
        pool.layer_values[layer].index_copy_(0, slots, value[0].transpose(0, 1))
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """Positions are explicit: nothing counts from the cache."""
        return 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the model asked its cache for {name!r}: it does not go through the packed attention "
            "(its inner module holds a config of its own, or its layers keep another state)"
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,  # [1, kv_heads, tokens, value_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedBatch | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Attention output, [1, tokens, heads, value_dim].

    Raises TypeError: an argument that it does not know, which a model may need to be right.
    """
    _refuse_unknown(module, attention_mask, dropout, packed, unknown)
    assert packed is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    for segment in packed.segments:
        _attend(output, query[0], key[0], value[0], packed, segment, layer, scale,
                sliding_window, softcap)  # fmt: skip
    return output[None], None


def _refuse_unknown(
    module: nn.Module,
    mask: Tensor | None,
    dropout: float,
    packed: PackedBatch | None,
    unknown: dict[str, Any],
) -> None:
    odd = [name for name, given in unknown.items()
           if name not in _NEUTRAL and given is not None and given is not False]  # fmt: skip
    if unknown.get("is_causal", True) is False:
        odd.append("is_causal=False")
    elif "is_causal" in odd:
        odd.remove("is_causal")
    if mask is not None:
        odd.append("attention_mask")
    if dropout:
        odd.append("dropout")
    if packed is None:
        odd.append("no packed batch")
    if odd:
        raise TypeError(
            f"{type(module).__name__} passed {', '.join(odd)} to its attention: expected scaling, "
            "sliding_window and softcap only; this architecture cannot be scored in packed form"
        )


def _attend(
    output: Tensor,  # [tokens, heads, value_dim], written
    query: Tensor,  # [heads, tokens, head_dim]
    key: Tensor,  # [kv_heads, tokens, head_dim]
    value: Tensor,  # [kv_heads, tokens, value_dim]
    packed: PackedBatch,
    segment: Segment,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    keys, values = packed.pool.keys[layer], packed.pool.layer_values[layer]
    table = packed.table[segment.table_row]
    if segment.prefix:
        span = slice(segment.start, segment.start + segment.prefix)
        last = segment.first + segment.prefix
        low = 0 if window is None else max(0, segment.first - window + 1)
        slots = table[low:last]
        output[span] = _attend_prefix(
            query[:, span], keys[slots], values[slots], segment.first - low, scale, window, softcap
        )
    if segment.candidates:
        start = segment.start + segment.prefix
        span = slice(start, start + segment.candidates)
        low = 0 if window is None else max(0, segment.length - window + 1)
        slots = table[low : segment.length]
        output[span] = _attend_candidates(
            query[:, span], key[:, span], value[:, span], keys[slots], values[slots], scale, softcap
        )


def _attend_prefix(
    query: Tensor,  # [heads, n, head_dim]
    keys: Tensor,  # [length, kv_heads, head_dim]
    values: Tensor,  # [length, kv_heads, value_dim]
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of n queries, the first of which stands at key `first`: [n, heads, dim]."""
    n, length = query.shape[1], len(keys)
    behind = (torch.arange(first, first + n, device=query.device)[:, None]
              - torch.arange(length, device=query.device))  # fmt: skip
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    k, v = keys.transpose(0, 1), values.transpose(0, 1)
    if softcap is None:
        plain = first == 0 and n == length and (window is None or window >= n)
        out = F.scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=None if plain else seen,
            is_causal=plain, scale=scale, enable_gqa=True,
        )[0]  # fmt: skip
        return out.transpose(0, 1)
    groups = query.shape[0] // k.shape[0]
    q = query.unflatten(0, (k.shape[0], groups))
    scores = _cap((q * scale) @ k[:, None].transpose(-1, -2), softcap)
    weights = scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(query.dtype)
    return (weights @ v[:, None]).flatten(0, 1).transpose(0, 1)


def _attend_candidates(
    query: Tensor,  # [heads, n, head_dim]
    own_key: Tensor,  # [kv_heads, n, head_dim]
    own_value: Tensor,  # [kv_heads, n, value_dim]
    keys: Tensor,  # [length, kv_heads, head_dim]
    values: Tensor,  # [length, kv_heads, value_dim]
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of n candidates to one shared prefix and each to itself: [n, heads, value_dim]."""
    heads, n, _ = query.shape
    kv_heads, length = keys.shape[1], len(keys)
    q = (query * scale).view(kv_heads, heads // kv_heads, n, -1)
    scores = q.new_empty(kv_heads, heads // kv_heads * n, length + 1)
    scores[:, :, :length] = torch.bmm(q.flatten(1, 2), keys.permute(1, 2, 0))
    scores[:, :, length] = (q * own_key[:, None]).sum(-1).flatten(1, 2)
    if softcap is not None:
        scores = _cap(scores, softcap)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    shared = torch.bmm(weights[:, :, :length], values.transpose(0, 1))
    own = weights[:, :, length].view(kv_heads, -1, n, 1) * own_value[:, None]
    return (shared.view(kv_heads, -1, n, own.shape[-1]) + own).flatten(0, 1).transpose(0, 1)


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap


AttentionInterface.register(ATTENTION_NAME, packed_attention)
