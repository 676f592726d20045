"""The tests: each file in a pytest of its own, several at once, with a time limit."""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.budget import Deadline
from benchmarks.gpu.processes import ROOT, Ended, run_python

_MARKED = re.compile(r"^@(pytest\.mark\.gpu\b|runs_kernels|on_cuda)", re.MULTILINE)
_COMPILE = "usual_variants_compile"
_MOST_AT_ONCE = 14
# Files that compile more kernels than one process does in the time.
_SHARDS = {
    "kernels/test_top_candidates.py": 5,
    "kernels/test_lm_head_value.py": 4,
    "kernels/test_lookahead_attention.py": 5,
    "kernels/test_value_head.py": 3,
}
# Python and torch take about so many seconds to start.
_SHORTEST = 10.0
_TESTS = ROOT / "tests"
_VLLM_FILE = "integrations/vllm/test_gpu.py"


@dataclass(frozen=True)
class Job:
    """One file's tests, or a part of them: kind "gpu", or "compile" for what needs no GPU."""

    file: Path
    kind: str
    shard: str = "1/1"

    @property
    def place(self) -> str:
        """Where the file stands among the tests."""
        file = self.file
        return file.relative_to(_TESTS).as_posix() if file.is_relative_to(_TESTS) else file.name

    @property
    def name(self) -> str:
        part = "" if self.shard == "1/1" else f", part {self.shard}"
        return f"{self.place}{part}"

    @property
    def selection(self) -> list[str]:
        if self.kind == "compile":
            return ["-m", "not gpu and not slow", "-k", _COMPILE]
        return ["-m", "gpu and not slow"]


@dataclass
class Suite:
    """What came of a job."""

    file: str
    what: str
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    problem: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        return {"kind": "tests", **asdict(self)}


def jobs(gpu: bool, tests: Path = _TESTS) -> list[Job]:
    """Every file with tests for a GPU, or without one with tests that compile; vLLM's own part runs
    its file."""
    found = []
    for file in sorted(tests.rglob("test_*.py")):
        text, place = file.read_text(), file.relative_to(tests).as_posix()
        if gpu and _MARKED.search(text) and place != _VLLM_FILE:
            parts = _SHARDS.get(place, 1)
            found += [Job(file, "gpu", f"{i + 1}/{parts}") for i in range(parts)]
        # A GPU's time is for what only a GPU can do.
        if not gpu and _COMPILE in text and file.parent.name == "kernels":
            found.append(Job(file, "compile"))
    # The slowest first.
    return sorted(found, key=lambda job: (job.kind != "gpu", -job.file.stat().st_size))


def vllm_jobs(tests: Path = _TESTS) -> list[Job]:
    """vLLM's tests, where it is installed."""
    return [Job(tests / _VLLM_FILE, "gpu")] if find_spec("vllm") else []


def run_jobs(
    given: Sequence[Job], seconds: float, folder: Path, at_once: int | None = None
) -> list[Suite]:
    """Runs the jobs beside each other, all of them in so many seconds."""
    deadline = Deadline(seconds)
    cores = os.cpu_count() or 1
    most = at_once or max(1, min(_MOST_AT_ONCE, cores - 2))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(most) as pool:
        return list(pool.map(lambda job: _run_job(job, deadline, folder), given))


def _run_job(job: Job, deadline: Deadline, folder: Path) -> Suite:
    if not deadline.allows(_SHORTEST):
        return Suite(job.name, job.kind, 0.0, problem="not run: the time was up")
    name = f"{job.place}-{job.kind}-{job.shard}".replace("/", "-")
    junit = folder / f"{name}.xml"
    # Without the project's addopts: their strictness refuses options of plugins that are missing.
    pytest = ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short"]
    pytest += ["-p", "benchmarks.gpu.shard", "--shard", job.shard]
    options = [*job.selection, f"--junitxml={junit}", str(job.file)]
    ended = run_python([*pytest, *options], deadline.left, folder / f"{name}.log")
    return read_suite(job, ended, junit)


def read_suite(job: Job, ended: Ended, junit: Path) -> Suite:
    """A job's outcome, from its junit file, or from its log where it did not get so far."""
    suite = Suite(job.name, job.kind, ended.seconds)
    if junit.is_file():
        for case in ElementTree.parse(junit).getroot().iter("testcase"):
            _count(suite, case)
    else:
        suite.passed = len(re.findall(r" PASSED\b", ended.output))
        suite.failed = len(re.findall(r" FAILED\b", ended.output))
    # 1: tests failed, and are listed; 5: none was selected.
    if ended.code not in (0, 1, 5) or (ended.code == 1 and not suite.failures):
        suite.problem = ended.problem
    return suite


def _count(suite: Suite, case: ElementTree.Element) -> None:
    wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
    if wrong is not None:
        suite.failed += 1
        text = (wrong.text or wrong.get("message") or "").strip()
        suite.failures.append({"test": case.get("name", ""), "text": text[-1200:]})
    elif case.find("skipped") is not None:
        suite.skipped += 1
    else:
        suite.passed += 1
