"""Whether a file arrived whole: what is wrong with one that cannot be read, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_POINTER = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download it again"


def unreadable(path: Path, expected: str, error: Exception | str) -> ValueError:
    """The error of a file that could not be read; says why, as far as its bytes tell."""
    size = path.stat().st_size if path.is_file() else 0
    if not size:
        reason = f"is empty: expected {expected}; {_AGAIN}"
    elif _begins_as_pointer(path):
        reason = f"is a git-lfs pointer: expected {expected}; fetch it with git lfs pull"
    else:
        said = " ".join(str(error).split()) or type(error).__name__
        reason = f"cannot be read as {expected} ({said}): {size:,} bytes came; {_AGAIN}"
    return ValueError(f"{path} {reason}")


@contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """An opened safetensors file. Raises ValueError: it did not arrive whole."""
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors weights", error) from error


def damaged(folder: Path, suffixes: tuple[str, ...]) -> ValueError | None:
    """The error of the first file with one of these suffixes that is empty or a git-lfs pointer."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        wanted = path.suffix in suffixes and path.is_file()
        if wanted and (not path.stat().st_size or _begins_as_pointer(path)):
            return unreadable(path, f"a {path.suffix[1:]} file", "")
    return None


def _begins_as_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER
