"""One server an address: vLLM binds its port minutes before it listens, and so could a second one.

A lock file for each port in the temporary folder, held while the server lives: shared by servers on
addresses of their own, exclusive for one on all addresses. The kernel drops it with our process.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from guided_decode.cli.errors import Refusal
from guided_decode.serving.file_lock import FileLock

_ALL = ("", "0.0.0.0", "::")


def require_free(host: str, port: int) -> None:
    """Raises Refusal: the address cannot be listened on; vLLM would say so much later."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise _refusal(host, port, str(error.strerror)) from None


@contextlib.contextmanager
def held(host: str, port: int) -> Iterator[None]:
    """Keeps the address for one server.

    Raises Refusal: another `guided-decode serve` has it, perhaps not listening yet.
    """
    with contextlib.ExitStack() as stack:
        is_all = host in _ALL
        names = [(f"{port}", is_all)] if is_all else [(f"{port}", False), (_own(host, port), True)]
        for name, exclusive in names:
            if not _lock(stack, name, exclusive=exclusive):
                raise _refusal(host, port, "another guided-decode serve is starting or runs there")
        yield


def _own(host: str, port: int) -> str:
    """The name of a single address's lock, however the address was spelt."""
    with contextlib.suppress(OSError):
        host = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    return f"{port}-{hashlib.sha256(host.encode()).hexdigest()[:16]}"


def _lock(stack: contextlib.ExitStack, name: str, *, exclusive: bool) -> bool:
    """Whether we got it, or cannot know."""
    path = Path(tempfile.gettempdir()) / f"guided-decode-serve-{name}.lock"
    lock = FileLock()
    stack.callback(lock.release)
    try:
        # Not through a link that somebody else may have put there.
        return lock.take(path, link=False, shared=not exclusive)
    except OSError:
        return True


def _refusal(host: str, port: int, reason: str) -> Refusal:
    return Refusal(
        f"--host {host} --port {port} cannot be listened on ({reason}): pass another --port"
    )
