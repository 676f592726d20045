"""A checkpoint's generation config without all that reshapes what is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

_KEPT = ("eos_token_id", "pad_token_id", "bos_token_id")


def bare(config: Any) -> GenerationConfig:
    """Its special tokens alone.

    It has to stand in the model's place: what a config that `generate` is given leaves open,
    `generate` takes from the model's.
    """
    from transformers import GenerationConfig

    return GenerationConfig(**{name: getattr(config, name, None) for name in _KEPT})
