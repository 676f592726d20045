"""How large a model's slot pool is: the shapes of its layers, and the memory that is free."""

import torch
from transformers import PreTrainedModel

from guided_decode.forward.activations import LOGIT_BYTES, graph_memory, graph_tokens
from guided_decode.forward.cache_argument import returned_cache

# The default pool takes at most this share of free memory, and no more than this many bytes.
_MEMORY_SHARE = 0.25
_MOST_BYTES = {"cpu": 2 << 30, "cuda": 32 << 30}


def layer_layout(
    model: PreTrainedModel,
) -> tuple[list[tuple[int, int, int]], list[torch.device]]:
    """(kv_heads, key_dim, value_dim) of each layer and its device, by a forward of one token."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        layers = returned_cache(model(input_ids=token, use_cache=True)).layers
    shapes, places = [], []
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ValueError(
                f"{type(model).__name__} has layers that keep no keys and values (recurrent or "
                "shared): expected attention with its own keys and values in every layer"
            )
        shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
        places.append(keys.device)
    return shapes, places


def default_capacity(
    shapes: list[tuple[int, int, int]],
    model: PreTrainedModel,
    bytes_beside: int,
    places: list[torch.device] | None = None,
) -> int:
    """Slots of the pool where the caller asks for no number: what a share of memory holds.

    places: the layers' devices, each of which has to have room for its own layers.
    """
    held = {model.device: 4 + bytes_beside}
    for (heads, k, v), place in zip(shapes, places or [model.device] * len(shapes), strict=True):
        held[place] = held.get(place, 0) + heads * (k + v) * model.dtype.itemsize
    room = min(_budget(model, place) // token_bytes for place, token_bytes in held.items())
    return max(1, min(1 << 17, room))


def _budget(model: PreTrainedModel, place: torch.device) -> int:
    """Bytes that a pool may take on a device."""
    budget = _MOST_BYTES.get(place.type, 2 << 30)
    if place.type == "cuda":
        budget = min(budget, int(_MEMORY_SHARE * torch.cuda.mem_get_info(place)[0]))
        budget -= graph_bytes(model)
    return budget


def most_graph_tokens(model: PreTrainedModel) -> int:
    """Tokens of the longest forward of this model that is a CUDA graph."""
    embeddings = model.get_input_embeddings().weight.numel()  # type: ignore[operator,union-attr]
    weights = sum(weight.numel() for weight in model.parameters()) - embeddings
    layer = weights / model.config.get_text_config().num_hidden_layers
    return graph_tokens(layer)


def graph_bytes(model: PreTrainedModel) -> int:
    """What the CUDA graphs of the forward hold, about: `graph_memory` of this model."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    itemsize = model.dtype.itemsize
    memory = graph_memory(most_graph_tokens(model), config.hidden_size, inner, itemsize)
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        return memory
    # A causal LM's logits, and as they come: a soft cap makes three of them.
    return memory + LOGIT_BYTES + 3 * LOGIT_BYTES * itemsize // 4
