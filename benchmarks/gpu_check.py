"""Every GPU test and benchmark in one command, and a report of what they gave.

    make gpu-check OUT_DIR=out PYTHON=python3
    python -m benchmarks.gpu_check --out out    # the same, from the repository's root

Under 9 minutes on one H200. Parts run in processes of their own, those with targets first, and the
report is written anew after each. Without a GPU only the tests that compile kernels run.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu import suites, vllm_cells
from benchmarks.gpu.budget import Budget, Deadline
from benchmarks.gpu.device import machine
from benchmarks.gpu.processes import read_records, run_python
from benchmarks.gpu.report import write
from benchmarks.gpu.targets import verdicts

RESULTS = Path("benchmarks/results")
MINUTES = 8.5
# Parts in their order, with their shares of the time.
SHARES = {
    "device": 20,
    "tests": 125,
    "13B targets": 65,
    "8B": 110,
    "kernels": 75,
    "13B": 65,
    "inside a step": 30,
    "vLLM": 20,
}
# vLLM's share where it is installed: its tests start two engines or four, its benchmark two.
VLLM_SHARE = 300
# Of that, what its tests may take; the benchmark gets what they leave.
_VLLM_TESTS = 0.55
# A process needs so long to end by itself before it is ended.
_GRACE = 6.0
_WITHOUT_GPU = {"tests": 1}
_COMPILE_SECONDS = 900.0
# An H200's, where they could not be measured: bytes and operations a second.
_ASSUMED_RATES = (4.3e12, 7.9e14)
_VLLM_MISSING = {"kind": "not run", "what": "vLLM's part", "reason": "vLLM is not installed"}


class Check:
    """The records so far, and what is known about the run."""

    def __init__(self, options: argparse.Namespace, command: str, console: Console) -> None:
        self.out: Path = options.out
        self.console = console
        self.records: list[dict[str, Any]] = []
        self.rates = _ASSUMED_RATES
        self._begun = time.monotonic()
        self._about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "machine": machine(),
        }

    @property
    def gpu(self) -> str | None:
        return self._about["machine"]["gpu"]

    def save(self) -> None:
        write(self.records, self._about | {"seconds": time.monotonic() - self._begun}, self.out)

    def part(self, name: str, seconds: float, folder: Path) -> None:
        """Runs a part in a process of its own, and takes what it leaves."""
        out = folder / f"{name}.jsonl"
        arguments = ["-m", "benchmarks.gpu.part", name, "--out", str(out)]
        arguments += ["--seconds", str(seconds - _GRACE), "--rates", *map(str, self.rates)]
        ended = run_python(arguments, seconds, folder / f"{name}.log")
        found = read_records(out)
        self.records += found
        measured = [record for record in found if record["kind"] == "rates"]
        if measured:
            self.rates = measured[0]["bytes"], measured[0]["flops"]
        if ended.problem is not None:
            self.records.append({"kind": "not run", "what": f"the rest of {name}",
                                 "reason": ended.problem})  # fmt: skip

    def tests(self, given: Sequence[suites.Job], seconds: float, folder: Path) -> None:
        """Runs tests, each file in a process of its own."""
        self.records += [suite.record for suite in suites.run_jobs(given, seconds, folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts; exit code 1 where tests failed, whatever the targets say."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    console = Console()
    check = Check(options, " ".join(["python -m benchmarks.gpu_check", *given]), console)
    with tempfile.TemporaryDirectory() as scratch:
        run(check, options, Path(scratch))
    check.save()
    show(check)
    failed = (r["failed"] or r["problem"] for r in check.records if r["kind"] == "tests")
    return int(any(failed))


def run(check: Check, options: argparse.Namespace, folder: Path) -> None:
    """All parts in their order; whatever one of them does, the others follow."""
    shares = gpu_shares() if check.gpu else _WITHOUT_GPU
    budget = Budget(60 * options.minutes, shares)
    if not check.gpu:
        check.console.print("no GPU here: only what compiles without one is run")
    for name in shares:
        seconds = budget.allot(name) if check.gpu else _COMPILE_SECONDS
        check.console.print(f"{name}: up to {seconds:.0f} s")
        try:
            _step(check, name)(seconds, folder)
        except Exception as error:
            check.records.append({"kind": "not run", "what": name,
                                  "reason": f"{type(error).__name__}: {error}"})  # fmt: skip
        check.save()


def gpu_shares() -> dict[str, int]:
    """The parts' shares; the others leave vLLM its own where it is installed."""
    return SHARES | ({"vLLM": VLLM_SHARE} if suites.vllm_jobs() else {})


def _step(check: Check, name: str) -> Callable[[float, Path], None]:
    if name == "tests":
        return lambda seconds, folder: check.tests(
            suites.jobs(gpu=check.gpu is not None), seconds, folder
        )
    if name == "vLLM":
        return lambda seconds, folder: _vllm(check, seconds, folder)
    return lambda seconds, folder: check.part(name, seconds, folder)


def _vllm(check: Check, seconds: float, folder: Path) -> None:
    given, deadline = suites.vllm_jobs(), Deadline(seconds)
    if not given:
        check.records.append(_VLLM_MISSING)
        return
    check.tests(given, _VLLM_TESTS * seconds, folder)
    check.save()
    check.records += vllm_cells.run(deadline.left, folder)


def show(check: Check) -> None:
    """The verdicts, what failed, and where the report is."""
    for each in verdicts(check.records):
        figure = "" if each.figure is None else f": {each.figure:.3f}"
        check.console.print(f"{each.word:>8}  {each.target} {each.bound}{figure}")
    for record in check.records:
        if record["kind"] == "tests" and (record["failed"] or record["problem"]):
            what = record["problem"] or f"{record['failed']} failed"
            check.console.print(f"{record['file']} ({record['what']}): {what}", markup=False)
        elif record["kind"] == "not run":
            check.console.print(f"not run: {record['what']}: {record['reason']}", markup=False)
    check.console.print(f"written: {check.out / 'report.md'} and report.json")


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
