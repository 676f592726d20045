"""`guided-decode scorer` as a user starts it, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

COMMAND = [sys.executable, "-m", "guided_decode", "scorer"]
_END_SECONDS = 30
_NOTHING: Mapping[str, str] = {}


@dataclass
class Scorer:
    """A scorer server that has said where it is. said: the whole line."""

    process: subprocess.Popen
    said: str

    @property
    def address(self) -> str:
        return re.search(r"is served at (\S+):", self.said)[1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_END_SECONDS)


@contextlib.contextmanager
def started(
    *arguments: object,
    listen: str = "tcp://127.0.0.1:0",
    command: Sequence[str] = COMMAND,
    told: Mapping[str, str] = _NOTHING,
) -> Iterator[Scorer]:
    """A server that is ready; it is gone when the block is left. told: its own environment."""
    usual = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, *map(str, arguments), "--listen", listen],
        env=os.environ | usual | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        assert said, process.stderr.read()
        yield Scorer(process, said)
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
