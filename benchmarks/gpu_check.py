"""Every GPU test and benchmark in one command, and a report of them.

    make gpu-check OUT_DIR=out PYTHON=python3
    python -m benchmarks.gpu_check --out out                  # the same, from the root
    python -m benchmarks.gpu_check --out out --part kernels   # half of it; the other: decoding
    python -m benchmarks.gpu_check --out out --fold           # a report of what a cut run has left

8 minutes on one H100 (80 GB) or H200. Parts run in processes of their own, those with targets
first; records are on disk as they come, and the report is written anew after each part. Without a
GPU only the tests that compile kernels run.
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
from benchmarks.gpu.device import assumed_rates, machine
from benchmarks.gpu.processes import run_python
from benchmarks.gpu.records import Records
from benchmarks.gpu.report import write
from benchmarks.gpu.targets import verdicts

RESULTS = Path("benchmarks/results")
# With the start of this process, and the end of the last part's.
MINUTES = 7.7
# Parts in their order, those with targets first, with their shares of the time.
SHARES = {
    "device": 15,
    "agreement": 40,
    "13B targets": 75,
    "kernels": 70,
    "tests": 90,
    "8B": 115,
    "13B": 65,
}
HALVES = {
    "kernels": ("device", "kernels", "tests"),
    "decoding": ("device", "agreement", "13B targets", "8B", "13B", "vLLM"),
}
# vLLM's share, where it is installed: its tests start two engines or four, its benchmark two.
VLLM_SHARE = 300
# Of that, what its tests may take; the benchmark gets what they leave.
_VLLM_TESTS = 0.55
# A process needs so long to end by itself before it is ended.
_GRACE = 6.0
_WITHOUT_GPU = {"tests": 1}
_COMPILE_SECONDS = 900.0
_VLLM_MISSING = {"kind": "not run", "what": "vLLM's part", "reason": "vLLM is not installed"}


class Check:
    """The records so far, and what is known about the run."""

    def __init__(self, options: argparse.Namespace, command: str, console: Console) -> None:
        self.out: Path = options.out
        self.console = console
        self.kept = Records(options.out)
        self._begun = time.monotonic()
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "machine": machine(),
        }
        self.gpu: str | None = about["machine"]["gpu"]
        self.kept.begin(about)

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.kept.all()

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes and operations a second: measured, or by the card's name."""
        measured = [record for record in self.records if record["kind"] == "rates"]
        if measured:
            return measured[0]["bytes"], measured[0]["flops"]
        return assumed_rates(self.gpu)

    def save(self) -> None:
        fold(self.kept, time.monotonic() - self._begun)

    def part(self, name: str, seconds: float, folder: Path) -> None:
        """Runs a part in a process of its own, which writes its records where they stay."""
        arguments = ["-m", "benchmarks.gpu.part", name, "--out", str(self.kept.file(name))]
        arguments += ["--seconds", str(seconds - _GRACE), "--rates", *map(str, self.rates)]
        differ = [r["way"] for r in self.records if r["kind"] == "agreement" and r["reason"]]
        if differ:
            arguments += ["--without", *differ]
        ended = run_python(arguments, seconds, folder / f"{name}.log")
        if ended.problem is not None:
            self.kept.add("gpu_check", [{"kind": "not run", "what": f"the rest of {name}",
                                         "reason": ended.problem}])  # fmt: skip

    def tests(self, given: Sequence[suites.Job], seconds: float, folder: Path) -> None:
        """Runs tests, each file in a process of its own."""
        self.kept.add("tests", [suite.record for suite in suites.run_jobs(given, seconds, folder)])


def fold(kept: Records, seconds: float | None = None) -> None:
    """The report of the records that there are."""
    write(kept.all(), kept.about() | {"seconds": seconds}, kept.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts; exit code 1 where tests failed, whatever the targets say."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    console = Console()
    if options.fold:
        fold(Records(options.out))
        return 0
    check = Check(options, " ".join(["python -m benchmarks.gpu_check", *given]), console)
    with tempfile.TemporaryDirectory() as scratch:
        run(check, options, Path(scratch))
    check.save()
    show(check)
    failed = (r["failed"] or r["problem"] for r in check.records if r["kind"] == "tests")
    return int(any(failed))


def run(check: Check, options: argparse.Namespace, folder: Path) -> None:
    """All parts in their order; whatever one of them does, the others follow."""
    shares = shares_of(options.part, gpu=check.gpu is not None)
    budget = Budget(60 * options.minutes, shares)
    if not check.gpu:
        check.console.print("no GPU here: only what compiles without one is run")
    if check.gpu and "vLLM" not in shares and options.part != "kernels":
        check.kept.add("gpu_check", [_VLLM_MISSING])
    for name in shares:
        seconds = budget.allot(name) if check.gpu else _COMPILE_SECONDS
        check.console.print(f"{name}: up to {seconds:.0f} s")
        try:
            _step(check, name)(seconds, folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            check.kept.add("gpu_check", [{"kind": "not run", "what": name, "reason": reason}])
        check.save()


def shares_of(half: str | None, *, gpu: bool) -> dict[str, int]:
    """The parts that are run, with their shares; vLLM has one where it is installed."""
    if not gpu:
        return _WITHOUT_GPU if half != "decoding" else {}
    every = SHARES | ({"vLLM": VLLM_SHARE} if suites.vllm_jobs() else {})
    return {name: share for name, share in every.items() if half is None or name in HALVES[half]}


def _step(check: Check, name: str) -> Callable[[float, Path], None]:
    if name == "tests":
        return lambda seconds, folder: check.tests(
            suites.jobs(gpu=check.gpu is not None), seconds, folder
        )
    if name == "vLLM":
        return lambda seconds, folder: _vllm(check, seconds, folder)
    return lambda seconds, folder: check.part(name, seconds, folder)


def _vllm(check: Check, seconds: float, folder: Path) -> None:
    deadline = Deadline(seconds)
    check.tests(suites.vllm_jobs(), _VLLM_TESTS * seconds, folder)
    check.save()
    check.kept.add("vLLM", vllm_cells.run(deadline.left, folder))


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
    parser.add_argument("--part", choices=tuple(HALVES), help="one half of the run; None: both")
    parser.add_argument("--fold", action="store_true", help="only write the report of a cut run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
