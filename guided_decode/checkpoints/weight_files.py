"""The weight files of a checkpoint: which tensors there are, and one tensor at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLE = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A checkpoint's weights, unread.

    location: a folder or a Hub id. files: tensor name to file name. pickle: whether the files are
    pickles, which the caller has allowed.
    """

    location: str
    revision: str | None
    files: Mapping[str, str]
    pickle: bool

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        path = _fetch(self.location, self.files[name], self.revision)
        assert path is not None, f"{self.location} lists {self.files[name]} but does not have it"
        if self.pickle:
            tensor: Tensor = _unpickle(path)[name]
            return tensor
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(name)


def open_weights(location: str, revision: str | None, allow_pickle: bool) -> WeightFiles:
    """The weights of a checkpoint: safetensors, or pickles where they are allowed.

    Raises ValueError: there are no weights, or only pickles that were not allowed, or an index
    names a file that is not there.
    """
    files = _tensor_files(location, revision, *_SAFETENSORS)
    if files is not None:
        return WeightFiles(location, revision, files, pickle=False)
    pickles = [name for name in _PICKLE if _fetch(location, name, revision) is not None]
    if not pickles:
        raise ValueError(
            f"{location} has no weights: expected {_SAFETENSORS[0]}, or {_SAFETENSORS[1]} and its "
            "shards; pass the folder that save_pretrained wrote"
        )
    if not allow_pickle:
        raise ValueError(
            f"{location} has its weights in {pickles[0]}, a pickle: expected safetensors; convert "
            "it with save_pretrained, or pass allow_pickle=True if you trust its author"
        )
    files = _tensor_files(location, revision, *_PICKLE)
    assert files is not None
    return WeightFiles(location, revision, files, pickle=True)


def _tensor_files(
    location: str, revision: str | None, single: str, index: str
) -> dict[str, str] | None:
    path = _fetch(location, single, revision)
    if path is not None:
        return dict.fromkeys(_names(path), single)
    path = _fetch(location, index, revision)
    if path is None:
        return None
    files: dict[str, str] = json.loads(path.read_text())["weight_map"]
    if Path(location).is_dir():
        absent = sorted({file for file in files.values() if not (Path(location) / file).is_file()})
        if absent:
            raise ValueError(
                f"{location} lacks {', '.join(absent)}, which {index} names: expected all shards; "
                "download the checkpoint again"
            )
    return files


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickle(path))
    with safe_open(path, framework="pt") as opened:
        return list(opened.keys())


def _unpickle(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _fetch(location: str, name: str, revision: str | None) -> Path | None:
    """Where a file of the checkpoint lies, downloaded if need be; None where it has no such."""
    path = cached_file(
        location, name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if path is None else Path(path)
