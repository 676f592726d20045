"""Folders that are made once and kept in the user's cache, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

# Where the cache lies instead of ~/.cache/guided-decode.
CACHE_VARIABLE = "GUIDED_DECODE_CACHE"


def cache_folder() -> Path:
    """Where made folders are kept: $GUIDED_DECODE_CACHE, else guided-decode in the user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "guided-decode"


def made_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made if it is not there.

    Of several processes one makes it and the others wait; one that is killed leaves nothing that
    is taken for a whole folder, and the next one removes it.

    Args:
        name: with the version of what it is made from.
        make: fills the empty folder that it is given.

    Raises ValueError: the cache cannot be written.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock with its process.
        with FileLock(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():
                _make(folder, make)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror or error}): expected a folder with room "
            f"for it; set {CACHE_VARIABLE} to another one"
        ) from error
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        make(partial)
        # mkdtemp's is for its owner alone, which a cache that is shared is not.
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
