"""The standard streams: closed ones, and output that cannot be written."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO


def open_closed() -> None:
    """Gives standard streams that came closed (`>&-`) a descriptor of their own.

    Files would get theirs otherwise, and `print` would say nothing in silence: what is written to
    a closed stdout fails when it is flushed; what is said to a closed stderr goes nowhere.
    """
    # In order, because the system hands out the lowest free descriptor.
    if sys.stdin is None:
        sys.stdin = _null(0, os.O_RDONLY, "r")
    if sys.stdout is None:
        sys.stdout = _null(1, os.O_RDONLY, "w")
    if sys.stderr is None:
        sys.stderr = _null(2, os.O_WRONLY, "w")


def _null(descriptor: int, flags: int, mode: str) -> IO[str]:
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    return open(descriptor, mode, encoding="utf-8", closefd=False)


def flush_output() -> None:
    """Raises OSError: what was printed cannot be written."""
    sys.stdout.flush()


def leave_unwritten() -> None:
    """Drops what stdout and stderr cannot write, so that the end of the process is silent."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
                stream.flush()
