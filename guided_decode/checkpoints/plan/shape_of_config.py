"""From a config.json alone to the model's shape: no class of transformers is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_decode.checkpoints.shape import Shape


@dataclass(frozen=True, slots=True)
class Build:
    """What a model type's class does beside the sizes, and the defaults of its config.

    defaults: of fields that a config.json may lack. qkv_bias, o_bias, mlp_bias: True, False, or the
    config field that says so.
    """

    defaults: Mapping[str, Any]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    norms: int = 2
    qk_norm: bool = False
    tied: bool = False


_GEMMA = {"head_dim": 256}
# By model_type: the classes of transformers 5.19, modeling_*.py and configuration_*.py of each.
BUILDS: dict[str, Build] = {
    "llama": Build({}, "attention_bias", "attention_bias", "mlp_bias"),
    "mistral": Build({"num_key_value_heads": 8}),
    "qwen2": Build({"num_key_value_heads": 32}, qkv_bias=True),
    "qwen3": Build(
        {"num_key_value_heads": 32, "head_dim": 128},
        "attention_bias",
        "attention_bias",
        qk_norm=True,
    ),
    "gemma": Build(
        _GEMMA | {"num_key_value_heads": 16}, "attention_bias", "attention_bias", tied=True
    ),
    "gemma2": Build(
        _GEMMA | {"num_key_value_heads": 4}, "attention_bias", "attention_bias", norms=4, tied=True
    ),
    "gemma3_text": Build(
        _GEMMA | {"num_key_value_heads": 4},
        "attention_bias",
        "attention_bias",
        norms=4,
        qk_norm=True,
        tied=True,
    ),
}
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
          "vocab_size")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """What a config.json says.

    architecture: its class, "" where it names none. labels: of its head; 0 without one.
    fields: all of it.
    """

    architecture: str
    shape: Shape
    labels: int
    fields: Mapping[str, Any]

    @property
    def positions(self) -> int | None:
        """Of the longest text."""
        given = self.fields.get("max_position_embeddings")
        return given if isinstance(given, int) else None

    @property
    def kind(self) -> str | None:
        """The kind of scorer that our own tools wrote into it."""
        ours = self.fields.get("guided_decode")
        return ours.get("kind") if isinstance(ours, dict) else None

    @property
    def quantised(self) -> Mapping[str, Any] | None:
        """How its weights were quantised already; None: they were not."""
        return self.fields.get("quantization_config") or None


def read_config(path: Path) -> Config:
    """The model that a config.json describes.

    Raises ValueError: no JSON object, a multimodal model or another type than these, or a size that
    is missing or is none.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): mend it or download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}: expected a model's config")
    architecture = _architecture(path, fields)
    return Config(architecture, _shape(path, fields), _labels(architecture, fields), fields)


def _shape(path: Path, fields: Mapping[str, Any]) -> Shape:
    kind = fields.get("model_type")
    if isinstance(fields.get("text_config"), dict):
        raise ValueError(
            f"{path} holds its text model's config inside another one (a multimodal model), which "
            "is not scored in packed form either: give the text model alone, "
            "with its text_config as config.json"
        )
    if kind not in BUILDS:
        raise ValueError(
            f"{path} has model_type {kind!r}, whose layers are not counted: expected one of "
            f"{', '.join(BUILDS)}"
        )
    build = BUILDS[kind]
    known = {**build.defaults, **{name: one for name, one in fields.items() if one is not None}}
    layers, hidden, intermediate, heads, vocab = (_size(path, known, name) for name in _SIZES)
    known = {"num_key_value_heads": heads, "head_dim": hidden // heads, **known}
    head_size = _size(path, known, "head_dim")
    return Shape(
        layers,
        hidden,
        intermediate,
        heads,
        _size(path, known, "num_key_value_heads"),
        vocab,
        head_size=None if head_size == hidden // heads else head_size,
        qkv_bias=_flag(build.qkv_bias, known),
        o_bias=_flag(build.o_bias, known),
        mlp_bias=_flag(build.mlp_bias, known),
        norms=build.norms,
        qk_norm=build.qk_norm,
        tied=bool(known.get("tie_word_embeddings", build.tied)),
    )


def _flag(given: bool | str, known: Mapping[str, Any]) -> bool:
    return bool(known.get(given, False)) if isinstance(given, str) else given


def _size(path: Path, known: Mapping[str, Any], name: str) -> int:
    given = known.get(name)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(f"{path} has {name} {given!r}: expected an integer of at least 1; mend it")
    return given


def _architecture(path: Path, fields: Mapping[str, Any]) -> str:
    named = fields.get("architectures") or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(
            f"{path} has architectures {named!r}: expected a list with the name of its class; "
            "mend it"
        )
    return named[0]


def _labels(architecture: str, fields: Mapping[str, Any]) -> int:
    if not architecture.endswith(("ForTokenClassification", "ForSequenceClassification")):
        return 0
    names = fields.get("id2label")
    # A config with two labels, which is the default, names none.
    return len(names) if isinstance(names, dict) and names else fields.get("num_labels") or 2
