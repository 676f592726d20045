"""What every model of one scorer is loaded with, and what follows from it."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from guided_decode.checkpoints.families import Family
from guided_decode.checkpoints.source import ModelLike
from guided_decode.checkpoints.tokenizer_match import check_tokenizers
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.self_check import check_packed

Tokenizer = str | PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LoadingOptions:
    """Arguments of `load_scorer` that hold for all its models; as documented there."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool
    rope_theta: float | None
    cache_tokens: int | None
    live_tokens: int | None
    max_forward_tokens: int
    policy_tokenizer: PreTrainedTokenizerBase | None

    @property
    def of_files(self) -> dict[str, Any]:
        names = ("revision", "allow_pickle", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    @property
    def of_weights(self) -> dict[str, Any]:
        names = ("device", "dtype", "rope_theta")
        return self.of_files | {name: getattr(self, name) for name in names}


def packed_model(
    model: PreTrainedModel, name: str, options: LoadingOptions, bytes_beside: int = 0
) -> PackedModel:
    """The model on its slot pool, checked against its stock self."""
    packed = PackedModel(
        model,
        name,
        cache_tokens=options.cache_tokens,
        live_tokens=options.live_tokens,
        max_forward_tokens=options.max_forward_tokens,
        bytes_beside=bytes_beside,
    )
    check_packed(packed)
    return packed


def conventions(
    family: Family, tokenizer: PreTrainedTokenizerBase | None, trunk: PreTrainedModel
) -> dict[str, Any]:
    """What a critic's family and its special tokens say about scoring."""
    bos_id = special_token("bos_token_id", tokenizer, trunk)
    return {
        "terminal": family.terminal,
        "skip_token": bos_id if family.bos == "drop" else None,
        "bos_token_id": bos_id,
        "eos_token_id": special_token("eos_token_id", tokenizer, trunk),
    }


def settled_dtype(
    model: ModelLike, device: torch.device | str | None, dtype: torch.dtype | None
) -> torch.dtype | None:
    """The dtype that was asked for; float32 for files on a CPU; None keeps the checkpoint's."""
    on_cpu = device is None or torch.device(device).type == "cpu"
    if dtype is not None or isinstance(model, PreTrainedModel) or not on_cpu:
        return dtype
    return torch.float32


def read_tokenizer(given: Tokenizer | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer itself, where its path was given."""
    if not isinstance(given, str):
        return given
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(given)
    return loaded


def check_tokenizer(options: LoadingOptions, scorers: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError: a model's tokenizer is not the policy's; what is not known is not held."""
    if options.policy_tokenizer is not None and scorers is not None:
        check_tokenizers(options.policy_tokenizer, scorers)


def special_token(
    name: str, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> int | None:
    """A special token's id: the tokenizer's, else the config's (the first, where it has many)."""
    found = getattr(tokenizer, name, None)
    if found is None:
        found = getattr(model.config.get_text_config(), name, None)
    return found[0] if isinstance(found, list) else found
