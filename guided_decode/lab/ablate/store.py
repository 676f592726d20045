"""A folder of finished units: each is written whole or not at all, and by one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from guided_decode.serving.file_lock import FileLock

_LOCK, _TEMPORARY = ".lock", ".guided-decode-tmp"
# NAME.PROCESS and that, of what is being written.
_HALF = re.compile(rf".+\.\d+{re.escape(_TEMPORARY)}")


class FolderInUse(ValueError):
    """Another process works in the folder."""


class Store:
    """What was computed, by kind and key, as JSON files of a folder.

    The folder is locked from `__enter__` on, so that no two processes compute the same; the system
    drops the lock with the process, however it ends. A file appears under its name when all of it
    is on the disk.
    """

    def __init__(self, folder: Path, kinds: Sequence[str] = ()) -> None:
        """kinds: of values, which have folders of their own."""
        self.folder = folder
        self._kinds = kinds
        self._lock = FileLock()

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """What was put; None: nothing was, or what there is was damaged."""
        try:
            found = json.loads(self._path(kind, key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(found, dict) and found.get("key") == key
        return found if whole else None

    def has(self, kind: str, key: str) -> bool:
        """Whether there is something, at no more than a look at the folder."""
        return self._path(kind, key).exists()

    def put(self, kind: str, key: str, value: dict[str, Any]) -> None:
        """Keeps a value. Raises OSError: it cannot be written."""
        text = json.dumps({**value, "key": key}, ensure_ascii=False, allow_nan=False)
        write_whole(self._path(kind, key), text.encode())

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"

    def __enter__(self) -> Store:
        """Raises FolderInUse: another process has it. OSError: it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.take(self.folder / _LOCK):
            raise FolderInUse(f"{self.folder} is being written by another process: let it end, or "
                              "pass another folder")  # fmt: skip
        for own in (self.folder, *(self.folder / kind for kind in self._kinds)):
            for half in own.glob(f"*{_TEMPORARY}"):
                # Of a process that was killed as it wrote.
                if _HALF.fullmatch(half.name) and half.is_file():
                    half.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in the place of the one of its name, all of it or nothing.

    Raises OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(half, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        raise
    # The name itself is the folder's, which has a place on the disk of its own.
    with contextlib.suppress(OSError):
        number = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
