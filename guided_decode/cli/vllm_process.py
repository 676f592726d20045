"""Running vLLM's server: signals go to it, its exit code comes back, and nothing stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from guided_decode.cli.vllm_command import METRICS_VARIABLE, Launch

_POLL_SECONDS = 0.5
# From the first signal on: while it loads, and once it serves.
_LOADING_GRACE_SECONDS, _SERVING_GRACE_SECONDS = 5.0, 12.0
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# Loaded before the fork, after which nothing may be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(slots=True)
class _State:
    """ready: it serves; ended: it is gone; asked: it was told to end; overdue: it was ended."""

    ready: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    asked: bool = False
    overdue: bool = False

    def exit_code(self, code: int) -> int:
        """Ours, for the server's: 0 only where it ended because it was asked to, and in order."""
        if not self.asked and code == 0:
            # vLLM's front end ends in order when its engine dies.
            print("error: the server ended by itself: its log has the reason", file=sys.stderr)
            return 1
        if self.overdue:
            return 0
        return code if code >= 0 else 128 - code


def run(launch: Launch, health: str | None, greeting: str, drain_seconds: float = 0.0) -> int:
    """Runs the server until it ends; returns its exit code, 1 where it ended without being asked.

    Args:
        launch: what is run.
        health: the URL that answers once it is ready, or None.
        greeting: printed then.
        drain_seconds: for how long vLLM lets requests finish that run when it is asked to end.
    """
    state = _State()
    with _metrics_folder() as metrics:
        # Its own session: Ctrl-C at a terminal reaches us only, and is handed on once.
        server = subprocess.Popen(
            launch.command,
            env={**os.environ, **launch.environment, **metrics},
            start_new_session=True,
            preexec_fn=None if _LIBC is None else _end_with_parent,
        )
        try:
            _forward_signals(server, state, drain_seconds + _SERVING_GRACE_SECONDS)
            if health is None:
                state.ready.set()
            else:
                _aside(_greet, health, greeting, state)
            code = server.wait()
        finally:
            state.ended.set()
            _end_session(server.pid)
    return state.exit_code(code)


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


def _forward_signals(server: subprocess.Popen[bytes], state: _State, serving_grace: float) -> None:
    """The first signal asks the server to end, the next one ends it, as does the end of a grace."""

    def forward(number: int, frame: FrameType | None) -> None:
        if state.asked:
            _end_session(server.pid)
            return
        state.asked = True
        server.send_signal(number)
        _aside(_end_overdue, server.pid, state, serving_grace)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)


def _end_overdue(leader: int, state: _State, serving_grace: float) -> None:
    """Ends what was asked to end and does not.

    vLLM 0.32 may wait for ever: for its engine when it is asked while it loads, and once the engine
    has gone for clients whose streams are open.
    """
    served = state.ready.is_set()
    if not state.ended.wait(serving_grace if served else _LOADING_GRACE_SECONDS):
        state.overdue = served
        _end_session(leader)


def _aside(work: Callable[..., None], *args: object) -> None:
    threading.Thread(target=work, args=args, daemon=True).start()


def _end_session(leader: int) -> None:
    """Ends what is left of the server's processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _greet(health: str, greeting: str, state: _State) -> None:
    # Not through a proxy: the server is here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not state.ended.wait(_POLL_SECONDS):
        with contextlib.suppress(urllib.error.URLError, OSError):
            opener.open(health, timeout=5).close()
            state.ready.set()
            print(greeting, flush=True)
            return
