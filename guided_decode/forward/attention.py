"""Attention of a packed forward, as a function that unmodified transformers modules call.

A prefix query sees its prefix up to itself; a candidate sees its prefix and itself, and no other
candidate. Keys and values lie in the slot pool, where the cache has just put this forward's own;
they are read once for all candidates of a row and for all query heads of a group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from guided_decode.forward.packed import How, PackedBatch
from guided_decode.forward.reads import Stretch, stretches
from guided_decode.kernels import lookahead_attention

ATTENTION_NAME = "guided_decode"

# Arguments that carry no mathematics of their own, or that are already in the packed batch.
_NEUTRAL = frozenset({"position_ids", "use_cache", "cache_position", "return_dict"})


class SlotCache:
    """A cache for transformers models that writes each token into its slot."""

    def __init__(self, batch: PackedBatch) -> None:
        self._batch = batch

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores key and value, [1, kv_heads, tokens, head_dim], and returns them."""
        pool, slots = self._batch.pool, self._batch.on(key.device).slots
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
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    how = How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if packed.heard is not None:
        packed.heard[layer] = how
    return attend(query[0].transpose(0, 1), packed, layer, how)[None], None


def attend(query: Tensor, packed: PackedBatch, layer: int, how: How) -> Tensor:
    """Attention of a layer whose keys and values are in their slots.

    Args:
        query: [tokens, heads, head_dim].
        packed: the batch, of any device.
        layer: its number in the pool.
        how: what its module asks for.

    Returns:
        [tokens, heads, value_dim].
    """
    packed = packed.on(query.device)
    keys, values = packed.pool.keys[layer], packed.pool.layer_values[layer]
    if packed.segment_table is not None:
        return lookahead_attention(
            query,
            keys,
            values,
            packed.table,
            packed.segment_table,
            packed.positions,
            packed.slots,
            scaling=how.scaling,
            max_queries=packed.most_queries,
            max_prefix=packed.most_positions,
            window=how.window,
            softcap=how.softcap,
        )
    scaled = query.transpose(0, 1) * how.scaling
    outputs = []
    for stretch in stretches(packed, how.window):
        own = scaled[:, stretch.queries]
        if stretch.long and how.softcap is None:
            outputs.append(_attend_fused(own, keys, values, stretch))
        else:
            outputs.append(_attend(own, keys, values, stretch, how.softcap))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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
    query: Tensor,  # [heads, n, head_dim], scaled
    keys: Tensor,  # [capacity, kv_heads, head_dim]
    values: Tensor,  # [capacity, kv_heads, value_dim]
    stretch: Stretch,
    softcap: float | None,
) -> Tensor:
    """Attention of n queries to the columns of their stretch: [n, heads, value_dim]."""
    heads, n, _ = query.shape
    kv_heads = keys.shape[1]
    q = query.reshape(kv_heads, heads // kv_heads * n, -1)
    mask = stretch.mask
    if mask is None and stretch.long:
        mask = q.new_full((n, n), -torch.inf).triu_(1)
    if mask is not None and kv_heads < heads:
        mask = mask.repeat(heads // kv_heads, 1)
    scores = _scores(q, [k.permute(1, 2, 0) for k in _read(keys, stretch)], mask, softcap)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    first, *others = _read(values, stretch)
    start = len(first)
    output = torch.bmm(weights[..., :start], first.transpose(0, 1))
    for v in others:
        output.baddbmm_(weights[..., start : start + len(v)], v.transpose(0, 1))
        start += len(v)
    return output.view(heads, n, -1).transpose(0, 1)


def _scores(
    q: Tensor,  # [kv_heads, m, head_dim]
    keys: list[Tensor],  # [kv_heads, head_dim, columns] each
    mask: Tensor | None,  # [m, columns of the last piece]
    softcap: float | None,
) -> Tensor:
    """Masked scores of m queries, [kv_heads, m, columns of all pieces]."""
    pieces = [torch.bmm(q, k) for k in keys[:-1]]
    if mask is None or softcap is not None:
        pieces.append(torch.bmm(q, keys[-1]))
    else:
        pieces.append(torch.baddbmm(mask, q, keys[-1]))
    if softcap is not None:
        pieces = [torch.tanh(piece / softcap) * softcap for piece in pieces]
        if mask is not None:
            pieces[-1] += mask
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _attend_fused(query: Tensor, keys: Tensor, values: Tensor, stretch: Stretch) -> Tensor:
    """The same for a long stretch, whose columns are one piece and in order."""
    (k,), (v,) = _read(keys, stretch), _read(values, stretch)
    out = F.scaled_dot_product_attention(
        query[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=stretch.mask,
        is_causal=stretch.mask is None, scale=1.0, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _read(pool: Tensor, stretch: Stretch) -> list[Tensor]:
    """The pool's rows of each run, without a copy, and of the gathered slots: [n, heads, dim]."""
    pieces = [pool[start:end] for start, end in stretch.runs]
    if len(stretch.gathered):
        pieces.append(pool.index_select(0, stretch.gathered))
    return pieces


AttentionInterface.register(ATTENTION_NAME, packed_attention)
