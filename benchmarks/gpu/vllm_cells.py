"""vLLM's throughput in `make gpu-check`: the benchmark in a process, and its JSON as records."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import run_python

Record = dict[str, Any]
WHAT = "benchmarks.vllm_throughput"
_CELLS = ["--prompt", "512", "--concurrency", "8", "32", "--full"]
_WAYS = ["--ways", "plain", "unused", "k 8", "half k 8"]
# Both engines start, and each cell has a round: less is not worth the beginning.
_SHORTEST = 60.0
# From the last round that is begun to the end of both engines' processes.
_GRACE = 20.0


def run(seconds: float, folder: Path) -> list[Record]:
    """The records of the cells that were done in the time, and of what was not."""
    if seconds < _SHORTEST:
        left = max(0.0, seconds)
        return [_not_run(WHAT, f"{left:.0f} s were left, and two engines must start")]
    out = folder / "vllm_throughput"
    arguments = ["-m", WHAT, *_CELLS, *_WAYS, "--seconds", str(seconds - _GRACE), "--out", str(out)]
    ended = run_python(arguments, seconds, folder / "vllm_throughput.log")
    written = _read(out / "vllm_throughput.json")
    found = list(records(written))
    missing = written.get("not_run", [])
    if missing or ended.problem is not None:
        what = f"the end of {WHAT}" if found else WHAT
        what = f"{WHAT}: {'; '.join(missing)}" if missing else what
        found.append(_not_run(what, ended.problem or "the time was up"))
    return found


def records(written: Record) -> Iterator[Record]:
    """A record of the engines, and one of each cell's way."""
    if "cells" not in written:
        return
    cells = written["cells"]
    yield {
        "kind": "vllm engines",
        "command": written["command"],
        "engines": written["engines"],
        "near_ties": sum(cell["near_ties"] for cell in cells),
        "targets": written["targets"],
    }
    for cell in cells:
        place = {name: cell[name] for name in ("prompt", "concurrency", "full")}
        for way, numbers in cell.items():
            if isinstance(numbers, dict):
                ratios = numbers["seconds_over_plain"]
                yield {
                    "kind": "vllm",
                    **place,
                    "way": way,
                    **numbers,
                    "over_plain": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                }


def _read(path: Path) -> Record:
    """What the benchmark wrote; nothing where it was stopped before, or while it did."""
    try:
        written: Record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return written


def _not_run(what: str, reason: str) -> Record:
    return {"kind": "not run", "what": what, "reason": reason}
