"""A check in a process of its own, which may die, hang or say whatever it likes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from guided_decode.cli.doctor.finding import Finding, Status

# Nothing is downloaded, nobody is told, and each library speaks of errors only.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
_TAIL = 300


def run(limit: float, name: str, check: str, **environment: str) -> Finding:
    """Runs the check `name` of `child`.

    Args:
        limit: seconds that it may take; what it started ends with it.
        name: of the function.
        check: what the finding is called.
        environment: beside the usual.
    """
    with tempfile.TemporaryDirectory(prefix="guided-decode-doctor-") as folder:
        result, noise = Path(folder, "finding.json"), Path(folder, "output")
        begun = time.monotonic()
        with noise.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "guided_decode.cli.doctor.child", name, str(result)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=os.environ | _ENVIRONMENT | environment, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                pass
            finally:
                ended = process.poll()
                _end_all(process)
        took = time.monotonic() - begun
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
            own = {"check": check, "status": Status(found["status"]), "seconds": took}
            return Finding(**(found | own))
        said = f"the check took longer than {limit:g} s" if ended is None else _death(ended)
        text = " ".join(noise.read_text(encoding="utf-8", errors="replace").split())
        tail = f": ...{text[-_TAIL:]}" if text else ""
        return Finding(check, Status.FAILURE, said + tail, seconds=took)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started: an engine's workers outlive an engine that died."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _death(code: int) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"
