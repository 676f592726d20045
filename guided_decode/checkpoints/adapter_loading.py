"""An adapter of files put on its base: merged into the weights where they allow it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from guided_decode.checkpoints.adapter_layers import refuse_beyond_layers, settle
from guided_decode.checkpoints.quantised_layers import is_quantised
from guided_decode.checkpoints.source import Source

_SHOWN = 5
_OF_QUANTISED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")
_PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def refuse_without_peft(source: Source) -> Any:
    """The module `peft`. Raises ImportError: it is not there, with the command that brings it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"{source.name} is a PEFT adapter, and peft cannot be imported ({error}): "
            "pip install 'guided-decode[peft]'"
        ) from error
    return peft


def put_on(base: PreTrainedModel, source: Source, *, merge: bool = True) -> bool:
    """Puts the adapter of a source on its base, in place.

    Args:
        base: the decoder that was loaded from the base's files, with or without its head.
        source: the adapter's.
        merge: into the weights, where these are plain numbers; else it stays in its layers.

    Returns:
        False where it was found on the way that this kind cannot be merged: the base is spoilt.

    Raises:
        ValueError: the adapter does not fit the base, or acts on more than its layers.
        ImportError: peft is not installed.
    """
    peft, files = refuse_without_peft(source), source.adapter
    assert files is not None
    assert source.weights is not None
    where = {"subfolder": files.folder.rstrip("/") or None, "revision": files.revision}
    holder = _holder(base, source)
    _resize(base, holder, source)
    with _explained(source):
        config = peft.PeftConfig.from_pretrained(files.location, **where)
    refuse_beyond_layers(source.name, config)
    _leave_heads(config, holder)
    with _explained(source):
        adapted = peft.PeftModel(holder, config)
        report = adapted.load_adapter(
            files.location, "default", torch_device=str(base.device), **where
        )
    _refuse_strange(report, holder, base, source)
    if merge and _can_merge(base):
        try:
            with _quiet():
                adapted.merge_and_unload()
        # What PEFT says where a kind has no merge, or a part of it no place in the weights.
        except (NotImplementedError, AttributeError, ValueError, RuntimeError):
            return False
    settle(base, None, source.name)
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Says of which adapter and base it is what PEFT says does not fit."""
    try:
        # Weights are drawn before they are read.
        with torch.random.fork_rng(devices=[]), _quiet():
            yield
    except (RuntimeError, TypeError, KeyError, AttributeError, OSError, ValueError) as error:
        said = " ".join((str(error).strip() or type(error).__name__).split())
        raise ValueError(
            f"{source.name}: its adapter does not fit its base {_base_name(source)}: {said}; "
            "expected the model that it was trained on; pass that one, with this as its adapter="
        ) from error


class _Holder(nn.Module):
    """A trunk under the name that a class with a head gives it: adapters name layers so."""

    is_gradient_checkpointing = False

    def __init__(self, name: str, trunk: PreTrainedModel) -> None:
        super().__init__()
        setattr(self, name, trunk)
        # By which PEFT picks the kind of its layers.
        for said in _OF_QUANTISED:
            if hasattr(trunk, said):
                setattr(self, said, getattr(trunk, said))


def _holder(base: PreTrainedModel, source: Source) -> nn.Module:
    """What the adapter's names are those of."""
    prefix = base.base_model_prefix
    if base.base_model is not base or not any(
        name.startswith(f"{prefix}.") for name in source.own_names
    ):
        return base
    return _Holder(prefix, base)


def _resize(base: PreTrainedModel, holder: nn.Module, source: Source) -> None:
    """Gives the base as many embeddings as come with the adapter, which may have added tokens."""
    embeddings: Any = base.get_input_embeddings()
    name = next(name for name, module in holder.named_modules() if module is embeddings)
    assert source.weights is not None
    if f"{name}.weight" not in source.own_names:
        return
    rows = len(source.weights.read(f"{name}.weight"))
    if rows != len(embeddings.weight):
        base.resize_token_embeddings(rows, mean_resizing=False)


def _leave_heads(config: Any, holder: nn.Module) -> None:
    """Takes out of an adapter's config the modules that are not in the holder: heads."""
    names = [name for name, _ in holder.named_modules()]
    wanted = getattr(config, "modules_to_save", None) or ()
    held = [each for each in wanted if any(f".{name}".endswith(f".{each}") for name in names)]
    if wanted:
        config.modules_to_save = held or None
    config.task_type = None
    config.inference_mode = True


def _refuse_strange(report: Any, holder: nn.Module, base: PreTrainedModel, source: Source) -> None:
    """Raises ValueError: layers of the decoder's that are only in one of the two."""
    # A head, and what a decoder without one has no place for, is read or left apart.
    inside = [f"{base.base_model_prefix}."] if holder is not base else [""]
    extra = [
        key
        for key in (each.removeprefix("base_model.model.") for each in report.unexpected_keys)
        if key.startswith(tuple(inside))
        and ("layers." in key or "embed" in key)
        # Once more what was saved whole, as PEFT does of embeddings that have grown.
        and ".modules_to_save." not in key
    ]
    for what, keys in (
        ("lacks weights of its adapter", sorted(report.missing_keys)),
        ("has weights that its base has no place for", sorted(extra)),
    ):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise ValueError(
                f"{source.name} {what}: {', '.join(keys[:_SHOWN])}{more}; expected an adapter of "
                f"{_base_name(source)}; pass the model that it was trained on, with this as its "
                "adapter=, or save it again"
            )


def _base_name(source: Source) -> str:
    assert source.base is not None
    return source.base.name


def _can_merge(base: PreTrainedModel) -> bool:
    """Whether all weights are plain numbers, and none is adapted that stands in two places."""
    if is_quantised(base):
        return False
    plain = all(
        type(each.data) is Tensor and each.dtype in _PLAIN and not each.is_meta
        for each in base.parameters()
    )
    return plain and not _adapts_what_is_tied(base)


def _adapts_what_is_tied(base: PreTrainedModel) -> bool:
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[1] is None:
        return False
    weights = [_under(each).weight for each in ends]
    tied = weights[0].data_ptr() == weights[1].data_ptr()
    return tied and any(_under(each) is not each for each in ends)


def _under(module: Any) -> Any:
    """The layer that PEFT's own are put around."""
    while hasattr(module, "base_layer") or hasattr(module, "token_adapter"):
        module = module.token_adapter if hasattr(module, "token_adapter") else module.base_layer
    return module
