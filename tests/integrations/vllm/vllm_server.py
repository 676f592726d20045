"""A vLLM server of its own process, for tests: started, talked to over HTTP, and ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from guided_decode.tiny_tulu import model_path
from tests import PATIENCE

# Small enough for any machine, and for prompts and answers of tiny-tulu.
SMALL = ("--max-model-len", "256", "--max-num-seqs", "32")
SERVE = (sys.executable, "-m", "guided_decode.cli", "serve")
PLAIN = (
    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_path("sft")),
    "--served-model-name", "tiny-tulu", "--host", "127.0.0.1", "--dtype", "float32",
    "--enforce-eager", "--logits-processors",
    "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor",
)  # fmt: skip


@dataclass(slots=True)
class Server:
    """A server's process, and its address."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    client: httpx.Client = field(init=False)
    _seen: set[psutil.Process] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The server closes a connection that was idle for 5 seconds, maybe as it is used again.
        limits = httpx.Limits(keepalive_expiry=1.0)
        address = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=address, timeout=PATIENCE, limits=limits)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "tiny-tulu", **body})

    def metrics(self) -> dict[str, float]:
        """What guided-decode has on /metrics, without its prefix and the counters' suffix."""
        # The worker publishes a tenth of a second after a step.
        time.sleep(0.3)
        text = self.client.get("/metrics").text
        lines = re.findall(r"^guided_decode_(\w+?)(?:_total)? (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def processes(self) -> list[psutil.Process]:
        """The server and its descendants."""
        root = psutil.Process(self.process.pid)
        self._seen |= {root, *root.children(recursive=True)}
        return self.left()

    def left(self) -> list[psutil.Process]:
        """Those of the processes seen so far that still run."""
        return [process for process in self._seen if _runs(process)]

    def wait_ready(self) -> None:
        until(lambda: self._is_ready() or self.process.poll() is not None)
        assert self._is_ready(), self.log.read_text()[-3000:]

    def end(self, number: int = signal.SIGINT) -> int:
        """Sends the signal and waits; returns the exit code."""
        if self.process.poll() is None:
            self.processes()
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server on a free port, perhaps not ready yet; it is gone when the block is left."""
    port = free_port()
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("GUIDED_DECODE_CONFIG", "PROMETHEUS_MULTIPROC_DIR")}  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=inherited | own | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        yield server
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.end()
        for one in server.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        server.client.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def until(condition: Any) -> None:
    """Waits until the condition holds; no longer than anything may take."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
