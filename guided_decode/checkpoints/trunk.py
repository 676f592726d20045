"""Models as decoders of their own: on their own config, ready to score and never to train."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from guided_decode.checkpoints.adapter_loading import put_on, refuse_without_peft
from guided_decode.checkpoints.own_copy import own_copy
from guided_decode.checkpoints.source import Source
from guided_decode.forward.weights import Origin, comes_from

_SHOWN = 5


def load_trunk(
    source: Source, dtype: torch.dtype | None, device: torch.device | str | None
) -> PreTrainedModel:
    """The decoder without a head: token ids in, last hidden states out.

    Raises ValueError: weights are missing, of another shape, or left over.
    """
    if source.instance is not None:
        return _copy(source, dtype, device, trunk=True)
    return _finish(_load(source, AutoModel, dtype), None, device)


def load_language_model(
    source: Source, dtype: torch.dtype | None, device: torch.device | str | None
) -> PreTrainedModel:
    """The decoder with its language-model head.

    Raises ValueError: as `load_trunk`, or it has no such head.
    """
    if source.instance is not None:
        if source.instance.get_output_embeddings() is None:
            raise ValueError(
                f"{source.name} is a {source.architecture}, which has no language-model head: "
                "expected a causal LM; pass one"
            )
        return _copy(source, dtype, device)
    return _finish(_load(source, AutoModelForCausalLM, dtype), None, device)


def load_decoded(source: Source, dtype: torch.dtype | None) -> PreTrainedModel:
    """A causal LM of files as it is decoded by `generate`: with its own attention.

    Raises ValueError: as `load_language_model`.
    """
    return _load(source, AutoModelForCausalLM, dtype)


def _copy(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    trunk: bool = False,
) -> PreTrainedModel:
    """A copy of a model in memory, or of its trunk; made anew when the model has changed."""
    model, memory = source.instance, source.memory
    assert model is not None
    assert memory is not None
    copied = _finish(own_copy(model.base_model if trunk else model), dtype, device)

    def again() -> PreTrainedModel:
        return _copy(memory.source(), dtype, device, trunk=trunk)

    return comes_from(copied, Origin((memory.watched,), again, memory.adapters))


def _finish(
    model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | str | None
) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    return model.eval().to(device=device, dtype=dtype)


def _load(source: Source, auto_class: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    if source.adapter is None:
        return _load_files(source, auto_class, dtype)
    refuse_without_peft(source)
    model = _load_files(source, auto_class, dtype)
    if not put_on(model, source):
        model = _load_files(source, auto_class, dtype)
        put_on(model, source, merge=False)
    return model


def _load_files(source: Source, auto_class: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a source's files, of an adapter's its base."""
    weights = source.weights if source.base is None else source.base.weights
    assert weights is not None
    try:
        with _no_load_report():
            model, report = auto_class.from_pretrained(
                weights.location,
                config=source.config,
                revision=weights.revision,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=not weights.pickle,
                trust_remote_code=source.trust_remote_code,
                # Named below, with both shapes: transformers names them in its table only.
                ignore_mismatched_sizes=True,
                key_mapping={f"^{re.escape(weights.wrapper)}": ""} if weights.wrapper else None,
                output_loading_info=True,
            )
    except (
        RuntimeError, AssertionError, TypeError, KeyError, AttributeError, OSError, SafetensorError
    ) as error:  # fmt: skip
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source.name}: {_misfit(source.config) or 'its weights do not fit its config'}; "
            f"expected the two of one model; {said}"
        ) from error
    _refuse("lacks weights", source, report["missing_keys"])
    _refuse_shapes(source, report["mismatched_keys"])
    extra = [key for key in report["unexpected_keys"] if "layers." in key and "inv_freq" not in key]
    _refuse("has weights that its config has no place for", source, extra)
    loaded: PreTrainedModel = model
    return loaded


def _misfit(config: PreTrainedConfig) -> str | None:
    """Why no model can be made from a config, where it is a usual reason."""
    text = config.get_text_config()
    pad, vocab = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(vocab, int) and pad >= vocab:
        return (
            f"pad_token_id {pad} in its config.json is outside the vocabulary of {vocab} tokens, "
            f"ids 0 to {vocab - 1}: set it to one of them or to null"
        )
    return None


def _refuse_shapes(source: Source, mismatched: Any) -> None:
    if mismatched:
        shown = "; ".join(
            f"{name} has the shape {list(stored)}, where the config makes {list(wanted)}"
            for name, stored, wanted in sorted(mismatched)[:_SHOWN]
        )
        raise ValueError(
            f"{source.name}: its weights do not fit its config; expected the two of one model; "
            f"{shown}; save both together again, or mend the config"
        )


def _refuse(what: str, source: Source, keys: Any) -> None:
    names = sorted(keys)
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(
            f"{source.name} {what}: {', '.join(names[:_SHOWN])}{more}; expected exactly those of "
            f"a {source.config.model_type} decoder with {source.config.num_hidden_layers} layers; "
            "save or download the checkpoint again"
        )


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Silences transformers' table of weights that it did not use: the head is read apart."""
    logger = logging.getLogger("transformers.modeling_utils")

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
