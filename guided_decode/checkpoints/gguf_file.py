"""GGUF files of llama.cpp: what their headers say, and the tensors that transformers leaves out."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from guided_decode.checkpoints.arrival import unreadable
from guided_decode.checkpoints.quantization import need

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# llama.cpp's names of a classifier's head, and that of most critics.
_HEAD_NAMES = {"cls.output": "score", "cls": "score"}
# Fields that a header and a config.json both have, by transformers' names.
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFile:
    """path: on this machine. fields: its metadata's single values. tensors: type by name."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, str]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.fields.get("general.architecture", "unknown"))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a vocabulary is in it."""
        return "tokenizer.ggml.model" in self.fields

    @property
    def stored_names(self) -> dict[str, str]:
        """Of the tensors outside its trunk: their names in the file by those of transformers."""
        found = {}
        for name in self.tensors:
            place, _, part = name.rpartition(".")
            if name == "output.weight":
                found["lm_head.weight"] = name
            elif not re.match(r"(blk\.\d|token_|output|rope_)", name):
                found[f"{_HEAD_NAMES.get(place, place)}.{part}"] = name
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; packed blocks as they are, in uint8."""
        for each in _reader(self.path).tensors:
            if each.name == name:
                plain = _PLAIN.get(each.tensor_type.name)
                raw = torch.from_numpy(each.data.copy())
                shape = [int(size) for size in reversed(each.shape)]
                return raw if plain is None else raw.view(plain).reshape(shape)
        raise KeyError(name)


def gguf_of(location: str, file: str | None, revision: str | None) -> tuple[str, str] | None:
    """The folder or repository of a GGUF file and the file's name; None where none was named.

    Args:
        location: a folder, a Hub id, or the path of a file.
        file: the `gguf_file` that came with it.
        revision: of the repository.

    Raises ValueError: there is no such file, or two were named.
    """
    path = Path(location)
    if file is None:
        if path.suffix != ".gguf":
            return None
        if not path.is_file():
            raise ValueError(f"{location}: no such file; pass the path of a GGUF file")
        return str(path.parent), path.name
    if path.suffix == ".gguf":
        raise ValueError(
            f"gguf_file={file!r} came with {location}, which is a GGUF file itself: expected a "
            "folder or a Hub id with it; drop one of the two"
        )
    if path.is_dir() and not (path / file).is_file():
        there = ", ".join(sorted(each.name for each in path.glob("*.gguf"))) or "none"
        raise ValueError(f"{location} has no {file}: expected one of its GGUF files ({there})")
    return location, file


def open_gguf(location: str, file: str, revision: str | None) -> GgufFile:
    """A GGUF file's header, downloaded if need be.

    Raises ValueError: it did not arrive whole, or is one of several parts; MissingLibrary: the
    package gguf is not installed.
    """
    need("gguf", f"the GGUF file {file}")
    found = cached_file(location, file, revision=revision)
    path = Path(found or file)
    header = _header(path, path.stat().st_mtime_ns)
    parts = header.fields.get("split.count", 0)
    if parts and int(parts) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts, which transformers does not put together: expected "
            "one file; merge them with llama.cpp's llama-gguf-split --merge"
        )
    return header


@functools.lru_cache(maxsize=8)
def _header(path: Path, changed: int) -> GgufFile:
    reader = _reader(path)
    fields = {}
    for name, field in reader.fields.items():
        # Arrays are vocabularies, which are long.
        if len(field.types) == 1:
            fields[name] = field.contents()
    tensors = {each.name: each.tensor_type.name for each in reader.tensors}
    return GgufFile(path, fields, tensors)


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    # It raises what comes of bytes that are none of a header.
    except Exception as error:
        raise unreadable(path, "a GGUF file", error) from error


def gguf_config(
    name: str, location: str, file: GgufFile, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """The config.json beside a GGUF file, where there is a whole one, else what its header says.

    Raises ValueError: transformers reads no file of its architecture; the two differ; or the header
    speaks of a rope that transformers leaves out.
    """
    own = _config_from_header(name, location, file, revision)
    beside = _config_beside(location, revision, trust_remote_code)
    if beside is None:
        _refuse_scaled_rope(name, file)
        return own
    for field in _SHARED:
        theirs, ours = getattr(beside, field, None), getattr(own, field, None)
        if None not in (theirs, ours) and theirs != ours:
            raise ValueError(
                f"{name} has {field} {ours} in its header, and {theirs} in the config.json beside "
                "it: expected the two of one model; pass the file in a folder of its own, or mend "
                "the config.json"
            )
    return beside


def _config_from_header(
    name: str, location: str, file: GgufFile, revision: str | None
) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            location, revision=revision, gguf_file=file.path.name
        )
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name}: transformers reads no GGUF file of the architecture {file.architecture} "
            f"({said[:300]}); pass the checkpoint that it was converted from"
        ) from error
    return config


def _config_beside(
    location: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig | None:
    """The config of the checkpoint that was converted; a stub beside the file is none."""
    try:
        found = cached_file(
            location, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    if found is None or not json.loads(Path(found).read_text()).get("architectures"):
        return None
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        location, revision=revision, trust_remote_code=trust_remote_code
    )
    return config


def _refuse_scaled_rope(name: str, file: GgufFile) -> None:
    scaling = file.fields.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(each.startswith("rope_") for each in file.tensors):
        raise ValueError(
            f"{name} has scaled rope frequencies in its header, which transformers does not read "
            "there: put the config.json of the checkpoint that it was converted from beside it"
        )
