"""The weight files of a checkpoint: which tensors there are, and one tensor at a time."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import cached_file

from guided_decode.checkpoints.arrival import opened_safetensors, unreadable
from guided_decode.checkpoints.gguf_file import GgufFile, open_gguf

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLE = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# LLaMA-Factory writes the head beside the causal LM; the pickle is older.
HEADS_BESIDE = ("value_head.safetensors", "value_head.bin")
# PEFT's files, and the name that its class puts before those of the model in it.
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTED = "base_model.model."
# TRL writes the head beside an adapter so.
_TRL_HEAD, _TRL_PLACE = "pytorch_model.bin", "v_head."
# What trainers wrap a language model in: TRL, and DeepSpeed-Chat in both of its spellings.
_WRAPPERS = ("pretrained_model.", "rwtransformer.", "rwtranrsformer.")


class Stored(NamedTuple):
    """Where a tensor lies, and what it is called there; location None is the checkpoint's own."""

    file: str
    name: str
    location: str | None = None


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A checkpoint's weights, unread.

    location: a folder or a Hub id. tensors: where each lies, by its name without `wrapper`, the
    prefix that its trainer's own class put before the language model's names. pickle: whether the
    files are pickles, which the caller has allowed. folder: where in the location they lie. gguf:
    the file that has the trunk, whose `tensors` are then what is no part of it.
    """

    location: str
    revision: str | None
    tensors: Mapping[str, Stored]
    pickle: bool
    wrapper: str = ""
    folder: str = ""
    gguf: GgufFile | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self.tensors)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        stored = self.tensors[name]
        elsewhere = stored.location is not None
        revision = None if elsewhere else self.revision
        path = _fetch(stored.location or self.location, stored.file, revision)
        assert path is not None, f"{self.location} lists {stored.file} but does not have it"
        if path.suffix == ".gguf":
            assert self.gguf is not None
            return self.gguf.read(stored.name)
        if path.suffix == ".bin":
            return _unpickle(path)[stored.name]
        with opened_safetensors(path) as opened:
            tensor: Tensor = opened.get_tensor(stored.name)
            return tensor


def open_weights(location: str, revision: str | None, allow_pickle: bool) -> WeightFiles:
    """The weights of a checkpoint: safetensors, or pickles where they are allowed.

    Raises ValueError: there are no weights, or only pickles that were not allowed, an index names
    a file that is not there, or a file did not arrive whole.
    """
    files = _tensor_files(location, revision, *_SAFETENSORS)
    if files is not None:
        return _weight_files(location, revision, files, allow_pickle, pickled=False)
    pickles = [name for name in _PICKLE if _fetch(location, name, revision) is not None]
    if not pickles:
        packed = sorted(each.name for each in Path(location).glob("*.gguf"))
        raise ValueError(
            f"{location} has no weights: expected {_SAFETENSORS[0]}, or {_SAFETENSORS[1]} and its "
            "shards; pass "
            + (f"gguf_file={packed[0]!r}" if packed else "the folder that save_pretrained wrote")
        )
    if not allow_pickle:
        raise ValueError(
            f"{location} has its weights in {pickles[0]}, a pickle: expected safetensors; convert "
            "it with save_pretrained, or pass allow_pickle=True if you trust its author"
        )
    files = _tensor_files(location, revision, *_PICKLE)
    assert files is not None
    return _weight_files(location, revision, files, allow_pickle, pickled=True)


def open_gguf_weights(location: str, file: str, revision: str | None) -> WeightFiles:
    """A GGUF file, with the head that lies in it or beside it.

    Raises ValueError: it did not arrive whole, or a file beside it did not.
    """
    gguf = open_gguf(location, file, revision)
    tensors = {name: Stored(file, stored) for name, stored in gguf.stored_names.items()}
    beside = {} if not Path(location).is_dir() else _safetensors_beside(location, revision)
    return WeightFiles(location, revision, tensors | beside, pickle=False, gguf=gguf)


def _safetensors_beside(location: str, revision: str | None) -> dict[str, Stored]:
    """The tensors of the checkpoint that a GGUF file was converted from, and of a head alone."""
    files = _tensor_files(location, revision, *_SAFETENSORS) or {}
    path = _fetch(location, HEADS_BESIDE[0], revision)
    files |= {} if path is None else dict.fromkeys(_names(path), path.name)
    return {name: Stored(file, name) for name, file in files.items() if _is_beside_trunk(name)}


def _is_beside_trunk(name: str) -> bool:
    return not name.startswith(("model.", "transformer.", "layers.", "lm_head."))


def with_head(weights: WeightFiles, head: str | Path, allow_pickle: bool) -> WeightFiles:
    """The same, with the head of a safetensors file or of another checkpoint, and no other.

    Raises ValueError: there is no such file or checkpoint, or it is a pickle that was not allowed.
    """
    path = Path(head)
    if path.suffix == ".bin" and path.is_file() and not allow_pickle:
        raise ValueError(
            f"head={str(head)!r} is a pickle: expected a safetensors file; convert it, or pass "
            "allow_pickle=True if you trust its author"
        )
    if path.is_file():
        found = {name: Stored(path.name, name, str(path.parent)) for name in _names(path)}
    else:
        other = open_weights(str(head), None, allow_pickle)
        found = {name: Stored(stored.file, stored.name, other.location)
                 for name, stored in other.tensors.items()}  # fmt: skip
    own = {name: stored for name, stored in found.items() if _is_beside_trunk(name)}
    trunk = {name: at for name, at in weights.tensors.items() if not _is_beside_trunk(name)}
    return replace(weights, tensors=trunk | own)


def _weight_files(
    location: str,
    revision: str | None,
    files: Mapping[str, str],
    allow_pickle: bool,
    *,
    pickled: bool,
) -> WeightFiles:
    wrapper = next((each for each in _WRAPPERS if any(n.startswith(each) for n in files)), "")
    tensors = {name.removeprefix(wrapper): Stored(file, name) for name, file in files.items()}
    beside = HEADS_BESIDE if allow_pickle else HEADS_BESIDE[:1]
    for file in beside:
        path = _fetch(location, file, revision)
        if path is not None:
            tensors = {name: Stored(file, name) for name in _names(path)} | tensors
            break
    return WeightFiles(location, revision, tensors, pickled, wrapper)


def open_adapter_weights(
    location: str, revision: str | None, folder: str, allow_pickle: bool
) -> WeightFiles:
    """The weights that PEFT saved, with a head that its trainer put beside them.

    Raises ValueError: there are none, or only pickles that were not allowed, or a file did not
    arrive whole.
    """

    def fetch(name: str) -> Path | None:
        return _fetch(location, folder + name, revision)

    file = next((name for name in _ADAPTERS if fetch(name) is not None), None)
    path = None if file is None else fetch(file)
    if file is None or path is None:
        raise ValueError(
            f"{location} has an adapter_config.json and no adapter: expected {_ADAPTERS[0]}, which "
            "save_pretrained of a PeftModel writes beside it"
        )
    if path.suffix == ".bin" and not allow_pickle:
        raise ValueError(
            f"{location} has its adapter in {file}, a pickle: expected {_ADAPTERS[0]}; save it "
            "again, or pass allow_pickle=True if you trust its author"
        )
    tensors = {n.removeprefix(_ADAPTED): Stored(folder + file, n) for n in _names(path)}
    for name in (*HEADS_BESIDE, _TRL_HEAD):
        beside = fetch(name) if name.endswith(".safetensors") or allow_pickle else None
        names = [] if beside is None else _names(beside)
        if names and (name != _TRL_HEAD or all(n.startswith(_TRL_PLACE) for n in names)):
            tensors = {n: Stored(folder + name, n) for n in names} | tensors
            break
    return WeightFiles(location, revision, tensors, path.suffix == ".bin", _ADAPTED, folder)


def pickled_head(weights: WeightFiles) -> str | None:
    """The name of a head's pickle that lies beside the weights, where there is one."""
    beside = (*HEADS_BESIDE, _TRL_HEAD) if weights.wrapper == _ADAPTED else HEADS_BESIDE
    return next(
        (
            name
            for name in beside
            if name.endswith(".bin")
            and _fetch(weights.location, weights.folder + name, weights.revision)
        ),
        None,
    )


def _tensor_files(
    location: str, revision: str | None, single: str, index: str
) -> dict[str, str] | None:
    path = _fetch(location, single, revision)
    if path is not None:
        return dict.fromkeys(_names(path), single)
    path = _fetch(location, index, revision)
    if path is None:
        return None
    files = _weight_map(path)
    folder = Path(location)
    if folder.is_dir():
        shards = sorted(set(files.values()))
        absent = [file for file in shards if not (folder / file).is_file()]
        if absent:
            raise ValueError(
                f"{location} lacks {', '.join(absent)}, which {index} names: expected all shards; "
                "download the checkpoint again"
            )
        # One that did not arrive whole shows in its header.
        for file in shards:
            _names(folder / file)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(index, "an index of shards in JSON", error) from error
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise unreadable(index, "an index of shards in JSON", "weight_map maps no names to files")
    return files


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickle(path))
    with opened_safetensors(path) as opened:
        return list(opened.keys())


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=_is_zip(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise unreadable(path, "pickled weights", str(error).partition("\n")[0]) from error
    if not isinstance(state, dict):
        raise unreadable(path, "pickled weights", f"a {type(state).__name__}, no tensors by name")
    return state


def _is_zip(path: Path) -> bool:
    """Whether torch.save wrote it in the format that can be mapped; older files cannot."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _fetch(location: str, name: str, revision: str | None) -> Path | None:
    """Where a file of the checkpoint lies, downloaded if need be; None where it has no such."""
    path = cached_file(
        location, name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if path is None else Path(path)
