"""Running vLLM's server: signals go to it, its exit code comes back, and nothing stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import FrameType

from guided_decode.cli.errors import Refusal
from guided_decode.cli.vllm_command import METRICS_VARIABLE, Launch

_POLL_SECONDS, _LOADING_GRACE_SECONDS = 0.5, 5.0
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# Loaded before the fork, after which nothing may be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def require_free(host: str, port: int) -> None:
    """Raises Refusal: the address cannot be listened on; vLLM would say so much later."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise Refusal(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}): "
            "pass another --port"
        ) from None


def run(launch: Launch, health: str | None, greeting: str) -> int:
    """Runs the server until it ends; returns its exit code.

    Args:
        launch: what is run.
        health: the URL that answers once it is ready, or None.
        greeting: printed then.
    """
    ready, ended = threading.Event(), threading.Event()
    with _metrics_folder() as metrics:
        # Its own session: Ctrl-C at a terminal reaches us only, and is handed on once.
        server = subprocess.Popen(
            launch.command,
            env={**os.environ, **launch.environment, **metrics},
            start_new_session=True,
            preexec_fn=None if _LIBC is None else _end_with_parent,
        )
        try:
            _forward_signals(server, ready, ended)
            if health is None:
                ready.set()
            else:
                _aside(_greet, health, greeting, ready, ended)
            code = server.wait()
        finally:
            ended.set()
            _end_session(server.pid)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _metrics_folder() -> Iterator[dict[str, str]]:
    """Where the server's processes share their counters, as a variable of the environment."""
    if METRICS_VARIABLE in os.environ:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="guided-decode-metrics-") as folder:
        yield {METRICS_VARIABLE: folder}


def _end_with_parent() -> None:
    """In the server's process: when ours is killed, it is asked to end."""
    assert _LIBC is not None
    _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _forward_signals(
    server: subprocess.Popen[bytes], ready: threading.Event, ended: threading.Event
) -> None:
    """The first signal asks the server to end, the next one ends it."""
    asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            _end_session(server.pid)
            return
        asked = True
        server.send_signal(number)
        if not ready.is_set():
            _aside(_end_loading, server.pid, ended)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)


def _end_loading(leader: int, ended: threading.Event) -> None:
    """vLLM 0.32 may wait for its engine for ever when it is asked to end while it loads."""
    if not ended.wait(_LOADING_GRACE_SECONDS):
        _end_session(leader)


def _aside(work: Callable[..., None], *args: object) -> None:
    threading.Thread(target=work, args=args, daemon=True).start()


def _end_session(leader: int) -> None:
    """Ends what is left of the server's processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _greet(health: str, greeting: str, ready: threading.Event, ended: threading.Event) -> None:
    # Not through a proxy: the server is here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not ended.wait(_POLL_SECONDS):
        with contextlib.suppress(urllib.error.URLError, OSError):
            opener.open(health, timeout=5).close()
            ready.set()
            print(greeting, flush=True)
            return
