"""Loading by transformers, whose report of weights is held to what is expected."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from guided_decode.checkpoints.quantization import MissingLibrary, stored_method
from guided_decode.checkpoints.source import Source

_SHOWN = 5
_TALKATIVE = ("modeling_utils", "distributed.tensor_parallel")


def from_pretrained(
    source: Source, auto_class: Any, given: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' own loading, whose report is read instead of printed.

    Raises ValueError: config and weights do not go together; MissingLibrary: a library that their
    quantisation needs is not installed.
    """
    files = source.decoder_files
    assert files is not None
    try:
        with _no_load_report():
            model, report = auto_class.from_pretrained(
                files.location,
                # Named by `check_report`, with both shapes: transformers names them in its table.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **given,
            )
    except (torch.OutOfMemoryError, MissingLibrary):
        raise
    except ImportError as error:
        raise MissingLibrary(f"{source.name}: {' '.join(str(error).split())}") from error
    except (
        RuntimeError, AssertionError, TypeError, KeyError, AttributeError, OSError, SafetensorError
    ) as error:  # fmt: skip
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        misfit = _misfit(source.config)
        if misfit is None and ("quantization_config" in given or stored_method(source.config)):
            raise ValueError(
                f"{source.name} cannot be loaded quantised as it was asked for or is stored: "
                f"{said}; pass another device or quantization, or another checkpoint of the model"
            ) from error
        raise ValueError(
            f"{source.name}: {misfit or 'its weights do not fit its config'}; "
            f"expected the two of one model; {said}"
        ) from error
    return model, report


def of_trunk(
    model: PreTrainedModel, report: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The trunk of a model that was loaded whole, and what the report says of it."""
    prefix = f"{model.base_model_prefix}."
    missing = [key.removeprefix(prefix) for key in report["missing_keys"] if key.startswith(prefix)]
    mismatched = [each for each in report["mismatched_keys"] if each[0].startswith(prefix)]
    own = report | {"missing_keys": missing, "mismatched_keys": mismatched}
    trunk: PreTrainedModel = model.base_model  # type: ignore[assignment]
    return trunk, own


def check_report(source: Source, report: dict[str, Any]) -> None:
    """Raises ValueError: weights are missing, of another shape, or left over."""
    _refuse("lacks weights", source, report["missing_keys"])
    _refuse_shapes(source, report["mismatched_keys"])
    extra = [key for key in report["unexpected_keys"] if "layers." in key and "inv_freq" not in key]
    _refuse("has weights that its config has no place for", source, extra)


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
    """Silences transformers' table of weights that it did not use: the head is read apart; and
    its list of those that a plan leaves whole."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in _TALKATIVE]

    def drop(record: logging.LogRecord) -> bool:
        return False

    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)
