"""Child processes with a time limit, whose end is certain and whose last words are kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LAST_WORDS = 1500


@dataclass(frozen=True)
class Ended:
    """A process that is over: exit code, None where its time was up; the end of its output."""

    code: int | None
    seconds: float
    output: str

    @property
    def problem(self) -> str | None:
        """What went wrong, in a line or a few."""
        if self.code == 0:
            return None
        how = "its time was up" if self.code is None else f"it ended with exit code {self.code}"
        return f"{how} after {self.seconds:.0f} s; its last words:\n{self.output[-_LAST_WORDS:]}"


def environment() -> dict[str, str]:
    """A child finds this checkout, and no model hub."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def run_python(arguments: Sequence[str], seconds: float, log: Path) -> Ended:
    """Runs this interpreter; the process and all that it started end when the time is up."""
    begun = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
    return Ended(code, time.monotonic() - begun, log.read_text(errors="replace"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a part, but for a last line that was not finished."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
