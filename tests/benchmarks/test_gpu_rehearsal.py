"""gpu-check rehearsed on a clock of its own: what comes first, and what a cut run leaves."""

import contextlib
import json
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import budget as budget_module
from benchmarks.gpu import decoding, processes, suites, targets
from benchmarks.gpu.budget import Budget, Deadline
from benchmarks.gpu.records import Records

# Seconds: the start of a part, a cell with its compiles and captures, a kernel's case, the tests.
START, CELL, KERNEL, TESTS = 12.0, 14.0, 0.8, 90.0
H100 = {"versions": {}, "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "cuda": "13",
        "multiprocessors": 132, "memory_gb": 85.0, "l2_mb": 50, "driver": "1"}  # fmt: skip
MOST_GIGABYTES = 78.0


class Killed(BaseException):
    """The end of the whole run, at whatever second."""


class Rehearsal:
    """A run whose parts take their seconds. written: (part, when, record)."""

    def __init__(self, monkeypatch, killed_at):
        self.now, self.killed_at, self.written = 0.0, killed_at, []
        clock = lambda: self.now  # noqa: E731
        monkeypatch.setattr(gpu_check.time, "monotonic", clock)
        monkeypatch.setattr(budget_module.time, "monotonic", clock)
        monkeypatch.setattr(gpu_check, "Budget", lambda *given: Budget(*given, clock))
        monkeypatch.setattr(gpu_check, "run_python", self.run_python)
        monkeypatch.setattr(gpu_check, "machine", lambda: H100)
        monkeypatch.setattr(suites, "run_jobs", self.run_jobs)
        monkeypatch.setattr(suites, "vllm_jobs", list)

    def spend(self, seconds):
        if self.now + seconds >= self.killed_at:
            raise Killed
        self.now += seconds

    def run_python(self, arguments, seconds, log):
        name, end = arguments[2], self.now + seconds
        with Path(arguments[arguments.index("--out") + 1]).open("a") as out:
            try:
                for taken, record in records_of(name):
                    if self.now + taken > end:
                        self.spend(end - self.now)
                        return processes.Ended(None, seconds, "")
                    self.spend(taken)
                    self.written.append((name, self.now, record))
                    out.write(json.dumps(record) + "\n")
            except Killed:
                out.write('{"kind": "half a rec')
                raise
        return processes.Ended(0, seconds, "")

    def run_jobs(self, given, seconds, folder):
        self.spend(min(TESTS, seconds))
        return []


def records_of(part):
    """Seconds until each record of a part, and the record."""
    if part == "device":
        yield START, {"kind": "rates", "bytes": 3e12, "flops": 7e14}
    elif part == "agreement":
        yield START, {"kind": "agreement", "way": "k", "reason": None, "difference": 1e-6}
    elif part == "kernels":
        yield START, {"kind": "launches", "kernel": "lm_head_value", "ours": 1}
        for _ in range(94):
            yield KERNEL, {"kind": "kernel", "target": True, "share_of_copy": 0.8}
    else:
        seconds = START
        for cell in decoding.STAGES[part]:
            if decoding._not_run(cell, Deadline(1e9), MOST_GIGABYTES) is not None:
                continue
            seconds += CELL
            for way in cell.ways:
                yield seconds, {"kind": "decoding", "model": cell.size.name, "way": way,
                                "batch": cell.batch, "prefix": cell.prefix, "over_floor": 1.0,
                                "over_plain": 1.0, "over_guided": 6.0}  # fmt: skip
                seconds = 0.0


def rehearse(monkeypatch, out, *options, killed_at=1e9):
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "write", lambda *given: None)
        rehearsal = Rehearsal(patch, killed_at)
        with contextlib.suppress(Killed):
            gpu_check.main(["--out", str(out), *options])
    return rehearsal


def test_a_whole_run_ends_in_8_minutes_with_every_target(monkeypatch, tmp_path):
    whole = rehearse(monkeypatch, tmp_path)
    assert whole.now <= 8 * 60
    records = [record for _, _, record in whole.written]
    assert {each.word for each in targets.verdicts(records)} == {"met"}


@pytest.mark.parametrize("half", list(gpu_check.HALVES))
def test_each_half_ends_in_its_time_and_has_its_parts_alone(monkeypatch, tmp_path, half):
    run = rehearse(monkeypatch, tmp_path, "--part", half)
    assert run.now <= 8 * 60
    assert {name for name, *_ in run.written} <= set(gpu_check.HALVES[half])


def test_targets_come_first_in_each_part(monkeypatch, tmp_path):
    whole = rehearse(monkeypatch, tmp_path)
    begun: dict[str, float] = {}
    for name, at, _ in whole.written:
        begun.setdefault(name, at)
    wanted = {"13B targets": ("k 16", 1), "8B": ("copied k 16", 8), "kernels": (None, None)}
    for part, cell in wanted.items():
        at = next(
            at for name, at, record in whole.written
            if name == part and (record.get("way"), record.get("batch")) == cell
        )  # fmt: skip
        assert at - begun[part] <= CELL
    parts = list(dict.fromkeys(name for name, *_ in whole.written))
    assert parts[:3] == ["device", "agreement", "13B targets"]


@pytest.mark.parametrize("half", [(), ("--part", "kernels"), ("--part", "decoding")])
def test_a_run_that_is_killed_at_any_second_leaves_every_finished_record(
    monkeypatch, tmp_path, half
):
    for second in range(1, 480, 29):
        cut = rehearse(monkeypatch, tmp_path, *half, killed_at=second + 0.5)
        kept = [record for record in Records(tmp_path).all() if record["kind"] != "not run"]
        assert kept == [record for *_, record in cut.written]


def test_what_a_cut_run_has_left_becomes_a_report(monkeypatch, tmp_path):
    rehearse(monkeypatch, tmp_path, killed_at=START + 1.0)
    assert not (tmp_path / "report.md").exists()
    assert gpu_check.main(["--out", str(tmp_path), "--fold"]) == 0
    assert "copy 3.00 TB/s" in (tmp_path / "report.md").read_text()
    assert "the run was cut short" in (tmp_path / "report.md").read_text()
