"""What a run of `score` was computed with: another scorer's lines are never taken for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from guided_decode.checkpoints.adapter_files import DEFAULT_ADAPTER, base_of
from guided_decode.checkpoints.registry import find
from guided_decode.cli.checkpoints import location

# Files of a checkpoint from which answers follow.
_READ = (".safetensors", ".bin", ".pt", ".json", ".model", ".txt", ".jinja", ".py")
_CHUNK = 1 << 24


def run_identity(
    models: Mapping[str, str | None],
    settings: Mapping[str, object],
    revision: str | None,
    gguf_file: str | None = None,
) -> str:
    """A short name for all that the scores follow from, besides the chats.

    Args:
        models: role to name, folder or file; the contents of what is on this machine count, not
            its name, and of what is on the Hub its commit.
        settings: whatever else changes scores, as text.
        revision: of the scorer's repository.
        gguf_file: of the scorer's folder, that has its weights.
    """
    contents = {
        role: fingerprint(name, *((revision, gguf_file) if role == "scorer" else ()))
        for role, name in models.items()
        if name is not None
    }
    return digest([contents, {name: str(value) for name, value in settings.items()}])


def digest(value: object) -> str:
    """16 hex digits of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(name: str, revision: str | None = None, gguf_file: str | None = None) -> str:
    """The contents of a model: of its files here, or the commit of its repository.

    Raises Refusal for a name that is no model's.
    """
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        return _of_file(path)
    where = location(name)
    if path.suffix == ".gguf":
        # What lies beside it is read, too: a config, a head, a tokenizer.
        where, gguf_file = str(path.parent), path.name
    if not Path(where).is_dir():
        return f"{where}@{_commit(where, revision)}"
    record = find(name)
    files = sorted(
        path for path in Path(where).iterdir() if path.suffix in _READ or path.name == gguf_file
    )
    contents = {path.name: _of_weights(path) for path in files if path.is_file()}
    known = [None if record is None else record.name, contents]
    base = base_of(where)
    return digest(known if base is None else [*known, fingerprint(base)])


def adapter_home(scorer: str, adapter: str | None) -> str | None:
    """The folder or Hub id of the adapter that was asked for: it may lie in the scorer's."""
    if adapter is None or adapter == DEFAULT_ADAPTER:
        return None
    inside = Path(location(scorer)) / adapter
    return str(inside) if inside.is_dir() else adapter


def _of_weights(path: Path) -> str:
    """A file of a model, which many units of one run are known by: read once, unless it changes."""
    state = path.stat()
    return _read_once(path.resolve(), state.st_mtime_ns, state.st_size)


@cache
def _read_once(path: Path, modified: int, size: int) -> str:
    return _of_file(path)


def _of_file(path: Path) -> str:
    contents = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            contents.update(chunk)
    return contents.hexdigest()


def _commit(repository: str, revision: str | None) -> str | None:
    """The commit that its files are read from; None where they cannot be had."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        found = cached_file(
            repository,
            "config.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError:
        return None
    commit: str | None = extract_commit_hash(found, None)
    return commit
