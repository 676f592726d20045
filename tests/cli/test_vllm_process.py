"""Running the server's process: what its end means, and what is ended that does not end."""

import signal
import subprocess
import sys
import time

import pytest

from tests import PATIENCE, ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="vLLM does not run on Windows")

# Runs a server of these lines, ready at once or never, as `serve` does, with a short grace.
RUNNER = """
import sys
from guided_decode.cli import vllm_process
from guided_decode.cli.vllm_command import Launch
vllm_process._SERVING_GRACE_SECONDS = vllm_process._LOADING_GRACE_SECONDS = 1.0
health = None if sys.argv[2] == "serves" else "http://127.0.0.1:9/health"
sys.exit(vllm_process.run(Launch([sys.executable, "-c", sys.argv[1]], {}), health, ""))
"""
ENDS_IN_ORDER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
print("here", flush=True)
time.sleep(60)
"""
WAITS_FOR_ITS_CLIENTS = ENDS_IN_ORDER.replace("sys.exit(0)", "None").replace("sleep(60)",
    "sleep(60); time.sleep(60)")  # fmt: skip


def started(server, state="serves"):
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, server, state],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def asked_to_end(server, state="serves"):
    process = started(server, state)
    assert process.stdout.readline() == "here\n"
    # Its own handlers are there once it said so; ours are set right after it started.
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    return process.wait(PATIENCE)


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (1, 1), (3, 3)])
def test_a_server_that_ends_by_itself_is_no_success(code, expected):
    """vLLM's front end ends with 0 when its engine has died."""
    process = started(f"import sys; sys.exit({code})")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == expected
    assert ("the server ended by itself" in errors) == (code == 0)


def test_a_server_that_ends_when_it_is_asked_to_is_one():
    assert asked_to_end(ENDS_IN_ORDER) == 0


def test_a_server_that_waits_for_open_streams_is_ended():
    assert asked_to_end(WAITS_FOR_ITS_CLIENTS) == 0


def test_a_server_that_does_not_end_while_it_loads_is_ended_and_no_success():
    assert asked_to_end(WAITS_FOR_ITS_CLIENTS, "loads") == 128 + signal.SIGKILL
