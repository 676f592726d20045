"""What every model of one scorer is loaded with, and what follows from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_decode.checkpoints.placement import DeviceMap
from guided_decode.checkpoints.quantised_layers import is_plain, is_quantised
from guided_decode.checkpoints.quantization import Quantization, stored_method
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.tensor_parallel import check_spans_ranks
from guided_decode.checkpoints.tokenizer_files import read_policy_tokenizer
from guided_decode.checkpoints.tokenizer_match import Sides, check_rows, check_tokenizers
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.self_check import check_packed
from guided_decode.forward.shards import Shards

Tokenizer = str | Path | PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LoadingOptions:
    """Arguments of `load_scorer` that hold for all its models; as documented there.

    writer, reader: who writes the ids of `policy_tokenizer` and who reads them, for errors.
    sharded: the processes that share the models by tensor parallelism; None: this one alone.
    """

    device: torch.device | None
    dtype: torch.dtype | None
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool
    rope_theta: float | None
    cache_tokens: int | None
    live_tokens: int | None
    max_forward_tokens: int
    policy_tokenizer: PreTrainedTokenizerBase | None
    writer: str = "the policy"
    reader: str = "the critic"
    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    sharded: Shards | None = None

    @property
    def of_files(self) -> dict[str, Any]:
        names = ("revision", "allow_pickle", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    @property
    def of_weights(self) -> dict[str, Any]:
        names = ("device", "dtype", "rope_theta", "quantization", "device_map", "sharded")
        return self.of_files | {name: getattr(self, name) for name in names}


def packed_model(
    model: PreTrainedModel, name: str, options: LoadingOptions, bytes_beside: int = 0
) -> PackedModel:
    """The model on its slot pool, checked against its stock self, on all ranks that share it."""
    sharded = options.sharded
    if sharded is not None:
        check_spans_ranks(model, name, sharded.ranks.world)
        sharded.begin(
            model,
            cache_tokens=options.cache_tokens,
            live_tokens=options.live_tokens,
            max_forward_tokens=options.max_forward_tokens,
        )
    try:
        packed = PackedModel(
            model,
            name,
            cache_tokens=options.cache_tokens,
            live_tokens=options.live_tokens,
            max_forward_tokens=options.max_forward_tokens,
            bytes_beside=bytes_beside,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Quantised layers that are not ready, or have no kernels for this device or dtype.
        if not is_quantised(model):
            raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"{name} is quantised and its own forward fails on {model.device} in "
            f"{str(model.dtype)[6:]} ({said}): expected a model that runs there; pass another "
            "device or dtype, or its name instead of the model"
        ) from error
    try:
        check_packed(packed)
    except ValueError:
        _refuse_non_finite(model, name)
        raise
    if sharded is not None and packed.mesh is not None:
        sharded.add(packed)
    return packed


def _refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError: a weight is NaN or infinite, so that nothing can be compared."""
    for weight, tensor in model.named_parameters():
        if is_plain(tensor) and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} has NaN or infinity in {weight}: expected numbers; save or download the "
                f"checkpoint again, or pass a wider dtype than {str(tensor.dtype)[6:]}"
            )


def read_tokenizer(given: Tokenizer | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer itself, where its path was given. Raises ValueError: it is none."""
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return given
    if isinstance(given, str | Path):
        return read_policy_tokenizer(str(given))
    raise ValueError(
        f"policy_tokenizer came as {type(given).__name__}: expected the policy's tokenizer of "
        "transformers, or its path"
    )


def check_tokenizer(
    options: LoadingOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    source: Source,
) -> None:
    """Holds a model to who writes its ids, the policy, as far as both are known.

    Raises ValueError: another tokenizer, or ids that the model has no row for.
    """
    policy = options.policy_tokenizer
    if policy is None:
        return
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if tokenizer is None:
        check_rows(policy, rows, source.name, options.writer)
        return
    in_memory = source.instance is not None
    sides = Sides(options.writer, options.reader)
    check_tokenizers(policy, tokenizer, sides, rows=rows if in_memory else None)


def options_for(options: LoadingOptions, source: Source) -> LoadingOptions:
    """The options of a companion: what is quantised already, or lies in memory, stays as it is.

    A dict of devices names modules of the scorer; its companions then are spread by accelerate.
    """
    as_it_is = source.instance is not None or source.is_gguf or stored_method(source.config)
    spread = options.device_map if isinstance(options.device_map, str) else "auto"
    return replace(
        options,
        quantization=None if as_it_is else options.quantization,
        device_map=None if options.device_map is None or source.instance is not None else spread,
    )


def options_of_companions(
    options: LoadingOptions, tokenizer: PreTrainedTokenizerBase | None, reader: str
) -> LoadingOptions:
    """The options of a reward model or reference: it reads what the policy or, where that is not
    known, its scorer reads."""
    if options.policy_tokenizer is not None:
        return replace(options, reader=reader)
    return replace(options, policy_tokenizer=tokenizer, writer="the scorer", reader=reader)
