"""The check at load: packed outputs on a forked prefix against the module's own forward."""

import logging

import numpy as np
import torch
from torch import Tensor

from guided_decode.cache.prefix_cache import PrefixCache
from guided_decode.forward.attention import ATTENTION_NAME
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed_model import PackedModel
from guided_decode.growable import Ints

logger = logging.getLogger("guided_decode")

# Largest difference, relative to the norm of the stock outputs, by whether the dtype is float32.
_ALLOWED = {True: 1e-3, False: 5e-2}
_LONGEST_WINDOW = 64


def check_packed(model: PackedModel) -> None:
    """Compares packed outputs with the stock forward's, for two candidates and a fork of theirs.

    In a pool of its own. A model that fails with merged layers goes on without them.

    Raises ValueError where they differ, or where the model passes its attention what the packed one
    does not know: it cannot be scored in packed form.
    """
    try:
        _check(model)
    except ValueError as error:
        if not model.unmerge():
            raise
        _check(model)
        logger.warning("%s: its decoder layers run unmerged, since merged: %s", model.name, error)


@without_autograd
def _check(model: PackedModel) -> None:
    length = _prefix_length(model)
    own, model.cache = model.cache, PrefixCache(model.cache.pool.like(length + 5))
    ids = np.random.default_rng(0).integers(0, model.vocab_size, length + 4)
    rows = [(ids[:length], np.unique(ids[length : length + 2]))]
    rows.append((ids[: length + 1], np.unique(ids[length + 2 :])))
    refused = f"{model.name} ({type(model.model).__name__}) cannot be scored in packed form"
    try:
        packed = torch.cat([_packed_outputs(model, *row) for row in rows]).float()
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{refused}: {error}") from error
    finally:
        model.cache = own
    stock = torch.cat([_stock_outputs(model, *row) for row in rows]).float()
    if not bool(stock.isfinite().all()):
        raise ValueError(
            f"{refused}: its own forward gives NaN or infinity in {str(model.model.dtype)[6:]}; "
            "pass a wider dtype, or another checkpoint"
        )
    differs = float((packed - stock).norm() / stock.norm().clamp(min=1e-9))
    allowed = _ALLOWED[model.model.dtype == torch.float32]
    if not differs <= allowed:
        raise ValueError(
            f"{refused}: its packed outputs differ from its stock forward's by {differs:.2g} of "
            f"their norm, where {allowed:g} is allowed"
        )


def _prefix_length(model: PackedModel) -> int:
    """Tokens to check with: more than a sliding window holds, if it is small."""
    window = getattr(model.model.config.get_text_config(), "sliding_window", None)
    length = 8 if window is None or window > _LONGEST_WINDOW else window + 4
    return max(1, min(length, (model.max_positions or length + 2) - 2))


def _packed_outputs(model: PackedModel, prefix: Ints, candidates: Ints) -> Tensor:
    """Hidden states or logits of the candidates, [k, size]."""
    is_lm = model.model.get_output_embeddings() is not None
    model.cache.begin_batch()
    placement = model.cache.place(prefix, 0, candidates)
    assert placement is not None
    outputs = []
    for batch in model.batches([placement]):
        every = torch.arange(len(batch.token_ids), device=model.device)
        outputs.append(model.forward(batch, every if is_lm else None))
    model.cache.end_batch()
    return torch.cat(outputs)[-len(candidates) :]


def _stock_outputs(model: PackedModel, prefix: Ints, candidates: Ints) -> Tensor:
    """The same by the module's own attention, without a cache."""
    ids = torch.from_numpy(np.stack([np.append(prefix, each) for each in candidates]))
    model.model.set_attn_implementation("eager")
    try:
        output = model.model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        model.model.set_attn_implementation(ATTENTION_NAME)
    last = (output.logits if hasattr(output, "logits") else output.last_hidden_state)[:, -1]
    return last.to(model.device)
