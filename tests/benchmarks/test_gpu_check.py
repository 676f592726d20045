"""`make gpu-check` without a GPU: its loop, floors, verdicts, time, tests and report."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import (
    agreement,
    decoding,
    device,
    kernel_cases,
    kernels,
    layer_cases,
    part,
    processes,
    suites,
    targets,
    vllm_cells,
)
from benchmarks.gpu.attention_case import attention_case
from benchmarks.gpu.budget import Budget, Deadline
from benchmarks.gpu.cells import Cell, Setup, gigabytes, k_of
from benchmarks.gpu.floors import (
    LLAMA2_13B,
    LLAMA3_8B,
    Rates,
    Size,
    Work,
    forward_work,
    step_floor,
    trunk_floor,
)
from benchmarks.gpu.loop import GATE_PERIOD, gate_script
from benchmarks.gpu.models import Models
from benchmarks.gpu.report import markdown
from guided_decode import GuidanceConfig
from guided_decode.forward.packed_model import PackedModel
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.scoring.critic import CriticScorer

TINY = Size("tiny", 2, 32, 48, 4, 2, 203, itemsize=4)
RATES = Rates(bytes=1e9, flops=1e9)


@pytest.fixture(scope="module")
def small():
    with torch.no_grad():
        return Models.random(TINY, "cpu", torch.float32)


def decoded(lane, steps):
    return torch.tensor([lane.step() for _ in range(steps)]).t()


@pytest.mark.parametrize("way", ["plain", "k 4"])
def test_the_loop_gives_the_tokens_of_generate(small, way):
    setup = Setup(small, 3, 40, ("plain", "k 4"), steps=9, drawn=False, capture=False)
    prompts = setup.prompts(way)
    packed = PackedModel(small.critic_trunk(), "the critic", cache_tokens=1000)
    route = {}
    if way != "plain":
        scorer = CriticScorer(packed, small.head)
        route["custom_generate"] = GuidedDecoding(scorer, GuidanceConfig(top_k=4))
    wanted = small.policy.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False, **route
    )
    assert torch.equal(decoded(setup.lane(way), 8), wanted[:, 40:])


def test_every_way_agrees_with_full_recomputation():
    found = list(agreement.agreements("cpu", capture=False, size=TINY))
    assert {record["way"] for record in found} == {agreement.kind_of(w) for w in agreement.WAYS}
    assert all(record["reason"] is None for record in found)
    assert 0 < max(record["difference"] for record in found) < 1e-4


def test_a_way_that_differs_is_found(monkeypatch):
    monkeypatch.setattr(agreement.Recomputed, "__call__", lambda self, logits, handles: logits + 1)
    reasons = {r["way"]: r["reason"] for r in agreement.agreements("cpu", capture=False, size=TINY)}
    # Those that the broken one stands beside; the others are timed.
    assert "keeps other candidates at step 0" in reasons["k"]
    assert reasons["plain"] is None
    assert reasons["pruning"] is None


def test_a_way_that_disagrees_loses_only_itself(small, monkeypatch):
    cell = Cell(TINY, 2, 20, ("plain", "k 4", "trunk k 4"))
    monkeypatch.setitem(decoding.STAGES, "8B", (cell,))
    monkeypatch.setattr(decoding.Models, "random", lambda *given: small)
    records = list(decoding.run("8B", RATES, Deadline(1000), without=["trunk k"]))
    assert [r["way"] for r in records if r["kind"] == "decoding"] == ["plain", "k 4"]
    (left,) = (record for record in records if record["kind"] == "not run")
    assert left["ways"] == ("trunk k 4",)
    assert left["reason"] == "it does not agree with full recomputation"
    *_, last = decoding.run("8B", RATES, Deadline(1000), without=["k", "trunk k"])
    assert last["reason"] == "no way is left"


def test_a_cell_gives_a_record_a_way(small):
    ways = ("plain", "k 4", "gated k 4", "trunk k 4", "pruning", "copied k 4", "generate")
    records = list(decoding.run_cell(small, Cell(TINY, 2, 20, ways), RATES, inside=True))
    timed = [record for record in records if record["kind"] == "decoding"]
    assert [record["way"] for record in timed] == list(ways)
    by_way = {record["way"]: record for record in timed}
    assert by_way["plain"]["over_plain"] == 1
    assert by_way["copied k 4"]["over_guided"] > 0
    assert by_way["gated k 4"]["over_floor"] is None
    layers = small.size.layers
    assert [list(by_way[way]["merged"]) for way in ways] == [
        [layers], [layers, layers], [layers, layers], [layers], [layers], [layers], []
    ]  # fmt: skip
    inside = [record["way"] for record in records if record["kind"] == "inside"]
    assert inside == ["plain"]


def test_the_gate_script_has_its_rate_in_every_period():
    raised = gate_script(rows=5, rate=0.7) > 0
    periods = raised.view(-1, GATE_PERIOD, 5)
    assert (periods.sum(1) == 7).all()


def test_ways_name_their_candidates():
    assert [k_of(way) for way in ("plain", "k 4", "gated k 16", "pruning", "generate")] == [
        None, 4, 16, None, None,
    ]  # fmt: skip


def test_floors_of_hand_worked_numbers():
    # Attention: 2 · 32 · 8 · (4 + 2); feed-forward: 3 · 32 · 48; two layers.
    assert TINY.trunk_weights == 2 * (3072 + 4608) == 15360
    assert TINY.table_weights == 203 * 32 == 6496
    assert TINY.kv_bytes == 2 * 2 * 8 * 2 * 4 == 256
    work = forward_work(TINY, rows=3, prefix=10, tokens=4, logits=True)
    # Weights once, and of each row 14 tokens' keys and values.
    assert work.bytes == (15360 + 6496) * 4 + 3 * 14 * 256
    # Products: 12 tokens through the trunk, 3 through lm_head; attention of 12 to 11 keys each.
    assert work.flops == 2 * (12 * 15360 + 3 * 6496) + 4 * 12 * 2 * 32 * 11
    assert Work(bytes=10, flops=3).seconds(Rates(bytes=5, flops=1)) == 3
    plain = step_floor(TINY, 3, 10, None, RATES)
    critic = forward_work(TINY, 3, 10, 4, logits=False).seconds(RATES)
    assert step_floor(TINY, 3, 10, 4, RATES) == pytest.approx(plain + critic)
    assert trunk_floor(TINY, 3, 10, 4, RATES) == work.seconds(RATES)


def test_real_shapes_have_their_sizes():
    assert LLAMA2_13B.trunk_weights + 2 * LLAMA2_13B.table_weights == pytest.approx(
        13.0e9, rel=0.01
    )
    assert LLAMA3_8B.trunk_weights + 2 * LLAMA3_8B.table_weights == pytest.approx(8.03e9, rel=0.01)
    assert LLAMA3_8B.kv_bytes * 4096 == pytest.approx(537e6, rel=0.01)


def test_cells_beyond_the_memory_are_skipped_and_say_so():
    deadline = Deadline(1000)
    ways = ("plain", "k 4", "k 8", "k 16", "k 32")
    reasons = {
        batch: decoding._not_run(Cell(LLAMA2_13B, batch, 4096, ways), deadline, 120.0)
        for batch in (1, 4, 16, 64)
    }
    assert reasons[1] is None
    assert reasons[4] is None
    assert "more than this card's 120" in reasons[16]
    assert "more than this card's 120" in reasons[64]
    assert decoding._not_run(decoding.COPIED, Deadline(1), 120.0) == "the time was up"
    stock = Cell(LLAMA3_8B, 4, 4096, ("plain",))
    longer = gigabytes(replace(stock, ways=("plain", "generate")), 40) - gigabytes(stock, 40)
    assert longer * 1e9 > 4 * 4096 * LLAMA3_8B.kv_bytes


def test_each_card_measures_the_target_against_copies_once():
    """110 GB on an H200; half the prefix on an H100 of 80 GB."""
    for memory, prefix in ((150.1, 4096), (85.0, 2048)):
        most = 0.92 * memory
        found = [
            cell.prefix
            for cell in (decoding.COPIED, decoding.COPIED_ON_A_SMALL_CARD)
            if decoding._not_run(cell, Deadline(1000), most) is None
        ]
        assert found == [prefix]
        for cell in (*decoding.STAGES["13B targets"], *decoding.STAGES["8B"][2:5]):
            assert decoding._not_run(cell, Deadline(1000), most) is None


def test_every_target_has_a_cell_in_a_stage():
    stages = [cell for cells in decoding.STAGES.values() for cell in cells]
    for cell in stages:
        assert all(way in ("plain", "pruning", "generate") or k_of(way) for way in cell.ways)
    records = [
        {"kind": "decoding", "model": cell.size.name, "batch": cell.batch, "prefix": cell.prefix,
         "way": way, "over_floor": 1.0, "over_plain": 1.0, "over_guided": 6.0}
        for cell in stages for way in cell.ways
    ]  # fmt: skip
    records.append({"kind": "kernel", "target": True, "share_of_copy": 0.8})
    records.append({"kind": "launches", "kernel": "lm_head_value", "ours": 1})
    assert {each.word for each in targets.verdicts(records)} == {"met"}


def test_verdicts_are_met_not_met_or_not_run():
    most = targets.Target("a", 2.0, lambda records: records[0]["x"])
    least = targets.Target("b", 2.0, lambda records: records[0]["x"], least=True)
    wanted = {1.0: ("met", "not met"), 2.0: ("met", "met"), 3.0: ("not met", "met")}
    for figure, expected in (wanted | {None: ("not run", "not run")}).items():
        records = [{"x": figure}]
        found = tuple(targets.verdict(target, records).word for target in (most, least))
        assert found == expected
    assert {each.word for each in targets.verdicts([])} == {"not run"}


def test_the_worst_of_batches_needs_them_all():
    def record(batch, ratio):
        return {"kind": "decoding", "model": "8B", "batch": batch, "prefix": 512,
                "way": "trunk k 4", "over_plain": ratio}  # fmt: skip

    pruned = next(t for t in targets.TARGETS if "lookahead over plain" in t.text)
    assert pruned.figure([record(1, 1.0), record(4, 1.2)]) is None
    assert pruned.figure([record(1, 1.0), record(4, 1.2), record(8, 1.1)]) == 1.2


def test_the_time_that_a_part_leaves_goes_to_the_others():
    now = [0.0]
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock=lambda: now[0])
    assert budget.allot("a") == 25
    now[0] = 5.0
    assert budget.allot("b") == pytest.approx(95 / 3)
    now[0] = 60.0
    assert budget.allot("c") == 40
    now[0] = 120.0
    assert budget.allot("c") == 0
    deadline = Deadline(10, clock=lambda: now[0])
    assert deadline.allows(10)
    assert not deadline.allows(10.5)


def test_kernels_are_compared_with_what_they_should_give():
    made = kernel_cases.KernelCase
    cases = [
        attention_case(made, TINY, 2, 3, 20, "cpu", torch.float32),
        *(case(made, TINY, 3, "cpu", torch.float32) for case in layer_cases.CASES),
        kernel_cases.value_head_case(TINY, 3, "cpu", torch.float32),
        kernel_cases.lm_head_case(TINY, 3, "cpu", torch.float32),
        kernel_cases.top_candidates_case(TINY, 3, 4, "cpu"),
        kernel_cases.guide_logits_case(TINY, 3, 4, "cpu"),
    ]
    for case in cases:
        assert kernels.relative_error(case.eager[0](), case.truth()) < 1e-5
    sampled = kernel_cases.sample_tokens_case(TINY, 3, "cpu")
    assert sampled.truth().shape == sampled.eager[0]().shape
    ones = torch.ones(4)
    assert kernels.relative_error(ones * 1.5, ones) == 0.5
    assert kernels.relative_error(ones / 0, ones) == float("inf")
    assert kernels.relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5


def test_a_kernel_that_fails_is_a_record_and_the_others_follow():
    def broken():
        raise RuntimeError("no such kernel")

    (record,) = kernels._recorded(kernel_cases.Maker(broken), lambda case: None)
    assert record["kind"] == "not run"
    assert "no such kernel" in record["reason"]


def file_with(folder, text):
    file = folder / "kernels" / "test_made_up.py"
    file.parent.mkdir()
    file.write_text(textwrap.dedent(text))
    return file


def test_the_tests_of_a_file_are_counted_and_their_failures_kept(tmp_path):
    file = file_with(tmp_path, """
        import pytest
        def test_usual_variants_compile(): pass
        @pytest.mark.gpu
        def test_one(): pass
        @pytest.mark.gpu
        def test_two(): assert 1 == 2, "it is broken"
        @pytest.mark.gpu
        def test_three(): pytest.skip("no")
    """)  # fmt: skip
    found = [*suites.jobs(gpu=True, tests=tmp_path), *suites.jobs(gpu=False, tests=tmp_path)]
    # A card's time is not spent on what needs none.
    assert [(job.file, job.kind) for job in found] == [(file, "gpu"), (file, "compile")]
    first, second = suites.run_jobs(found, 60, tmp_path / "logs")
    assert (first.passed, first.failed, first.skipped, first.problem) == (1, 1, 1, None)
    assert "it is broken" in first.failures[0]["text"]
    assert (second.passed, second.failed) == (1, 0)


def test_parts_of_a_file_share_its_tests(tmp_path):
    file = file_with(tmp_path, """
        import pytest
        @pytest.mark.gpu
        @pytest.mark.parametrize("n", range(5))
        def test_one(n): pass
    """)  # fmt: skip
    parts = [suites.Job(file, "gpu", f"{part}/2") for part in (1, 2)]
    assert [suite.passed for suite in suites.run_jobs(parts, 60, tmp_path / "logs")] == [3, 2]


def test_jobs_share_their_time(tmp_path):
    file = file_with(tmp_path, "def test_usual_variants_compile(): pass")
    (suite,) = suites.run_jobs([suites.Job(file, "compile")], 1, tmp_path / "logs")
    assert suite.problem == "not run: the time was up"


def test_a_test_that_fails_is_the_exit_code(tmp_path, monkeypatch, capsys):
    without_gpu(monkeypatch, file_with(tmp_path, "def test_usual_variants_compile(): assert 0"))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    waits = ["-c", "import time; print('begun', flush=True); time.sleep(60)"]
    ended = processes.run_python(waits, 1.5, tmp_path / "log")
    assert ended.code is None
    assert "its time was up" in ended.problem
    assert "begun" in ended.output


def test_parts_compare_float32_and_not_tf32(monkeypatch, tmp_path):
    before = torch.get_float32_matmul_precision()
    found = []

    def run():
        found.append(torch.get_float32_matmul_precision())
        yield {"kind": "rates"}

    monkeypatch.setattr(device, "run", run)
    monkeypatch.setattr(
        "sys.argv", ["part", "device", "--out", str(tmp_path / "records.jsonl"), "--seconds", "1"]
    )
    torch.set_float32_matmul_precision("high")
    try:
        assert part.main() == 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["highest"] == [before]


def test_records_of_a_part_that_was_stopped_are_read(tmp_path):
    (tmp_path / "records").write_text('{"kind": "rates"}\n{"kind": "dec')
    assert processes.read_records(tmp_path / "records") == [{"kind": "rates"}]
    assert processes.read_records(tmp_path / "none") == []


def without_gpu(monkeypatch, file):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(suites, "jobs", lambda gpu: [suites.Job(file, "compile")] * (not gpu))


def test_without_a_gpu_it_says_so_and_reports(tmp_path, monkeypatch, capsys):
    file = file_with(tmp_path, "def test_usual_variants_compile(): pass")
    without_gpu(monkeypatch, file)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 0
    assert "no GPU here" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "GPU: none" in report
    assert "| test_made_up.py | compile | 1 | 0 | 0 |" in report
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {each["word"] for each in written["targets"]} == {"not run"}
    assert written["command"] == f"python -m benchmarks.gpu_check --out {tmp_path / 'out'}"
    assert written["machine"]["versions"]["torch"] == metadata.version("torch")


def test_a_part_that_fails_keeps_no_other_from_reporting(tmp_path, monkeypatch):
    without_gpu(monkeypatch, file_with(tmp_path, "def test_usual_variants_compile(): pass"))
    facts = {"versions": {}, "gpu": "A GPU", "capability": "9.0", "multiprocessors": 1,
             "memory_gb": 1, "l2_mb": 1, "cuda": "13", "driver": "1"}  # fmt: skip
    monkeypatch.setattr(gpu_check, "machine", lambda: facts)
    monkeypatch.setattr(gpu_check, "SHARES", {"device": 1, "tests": 1, "8B": 1})

    def ended(arguments, seconds, log):
        if "device" not in arguments:
            raise OSError("the machine is on fire")
        out = Path(arguments[arguments.index("--out") + 1])
        out.write_text(json.dumps({"kind": "rates", "bytes": 2e12, "flops": 3e14}))
        return processes.Ended(0, 1.0, "")

    monkeypatch.setattr(gpu_check, "run_python", ended)
    monkeypatch.setattr(suites, "vllm_jobs", list)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "copy 2.00 TB/s" in report
    assert "- 8B: not run: OSError: the machine is on fire" in report
    assert "vLLM is not installed" in report


def test_the_report_shows_what_was_measured():
    cell = {"kind": "decoding", "model": "8B", "batch": 1, "prefix": 512, "ms_least": 1.0,
            "ms_most": 3.0, "floor_ms": 1.5, "over_floor": 1.3, "over_guided": None,
            "graphs": 2.0, "merged": [40, 39]}  # fmt: skip
    records = [
        {"kind": "kernel", "kernel": "value_head", "shape": "16 rows", "target": False,
         "error": 1e-5, "microseconds": 4.0, "least": 3.9, "most": 4.2, "bytes": 1e6,
         "share_of_copy": 0.1, "eager_microseconds": 30.0, "others": {"a library": "no"}},
        {"kind": "launches", "kernel": "value_head", "shape": "16 rows", "ours": 1, "eager": 9},
        {"kind": "compiled", "kernel": "value_head", "shape": "16 rows", "microseconds": 8.0},
        {**cell, "way": "k 16", "ms": 4.0, "over_plain": 2.0},
        {**cell, "way": "generate", "ms": 2.0, "over_plain": 1.0},
        {"kind": "inside", "cell": "a cell", "way": "k 16", "parts_ms": {"policy": 1.0},
         "device_ms": 0.9, "kernels_a_step": 7.0, "host_waits": 3,
         "slowest": [{"name": "a|b", "count": 1.0, "ms": 0.5}]},
        {"kind": "not run", "what": "13B, batch 64", "ways": ("plain",), "reason": "too large"},
    ]  # fmt: skip
    about = {
        "date": "today",
        "command": "it",
        "seconds": 1.0,
        "machine": {"versions": {}, "gpu": None},
    }
    text = "\n".join(markdown(records, about))
    assert "| 4.0 (3.9–4.2) | 10% | 30.0 | 8.0 | a library: no | 1 of 9 |" in text
    assert (
        "| 8B | 1 | 512 | k 16 | 4.00 (1.00–3.00) | 1.50 | 1.30 | 2.00 | 2.00 | — | 2.0 | 40 + 39 |"
        in text
    )
    assert "the host waits 3 times" in text
    assert "- 13B, batch 64 (plain): not run: too large" in text


WRITTEN = {
    "command": "python -m benchmarks.vllm_throughput --full",
    "engines": {"plain": {"model_runner": "V2"}, "with the processor": {"model_runner": "V2"}},
    "targets": [{"target": "unused ≤ 1.05× plain: 1.020", "met": True}],
    "not_run": [],
    "cells": [
        {"prompt": 512, "concurrency": 128, "full": True, "near_ties": 2,
         "plain": {"tokens_per_second": 9000.0, "seconds_over_plain": [1.0, 1.0],
                   "unguided_latency_ms": 2.5, "host_microseconds_a_row": None,
                   "preemptions": 31},
         "k 8": {"tokens_per_second": 4000.0, "seconds_over_plain": [2.0, 2.5],
                 "unguided_latency_ms": None, "host_microseconds_a_row": 41.0,
                 "preemptions": 32}},
    ],
}  # fmt: skip


def vllm_part(monkeypatch, tmp_path, written, code=0):
    """The part's records, where the benchmark leaves this text and ends so."""

    def ended(arguments, seconds, log):
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir()
        (out / "vllm_throughput.json").write_text(written)
        assert float(arguments[arguments.index("--seconds") + 1]) < seconds
        return processes.Ended(code, seconds, "an engine said this")

    monkeypatch.setattr(vllm_cells, "run_python", ended)
    return vllm_cells.run(200.0, tmp_path)


def test_the_throughput_in_vllm_is_in_the_report(monkeypatch, tmp_path):
    found = vllm_part(monkeypatch, tmp_path, json.dumps(WRITTEN))
    assert [record["kind"] for record in found] == ["vllm engines", "vllm", "vllm"]
    about = {"date": "", "command": "", "seconds": 1.0, "machine": {"versions": {}, "gpu": None}}
    text = "\n".join(markdown(found, about))
    assert "| 512 | 128 | full | plain | 9,000 | 1.00 (1.00–1.00) | 2 | 2.50 | — | 31 |" in text
    assert "| 512 | 128 | full | k 8 | 4,000 | 2.25 (2.00–2.50) | 2 | — | 41 | 32 |" in text
    assert "- with the processor: model_runner V2" in text
    assert "parted at a near tie: 2" in text
    assert "- met: unused ≤ 1.05× plain: 1.020" in text
    assert "Not run" not in text


def test_cells_of_vllm_for_which_the_time_was_too_short_are_named(monkeypatch, tmp_path):
    written = json.dumps({**WRITTEN, "not_run": ["prompts of 20, concurrency 8"]})
    *found, left = vllm_part(monkeypatch, tmp_path, written)
    assert len(found) == 3
    assert left == {
        "kind": "not run",
        "what": "benchmarks.vllm_throughput: prompts of 20, concurrency 8",
        "reason": "the time was up",
    }


@pytest.mark.parametrize(
    ("written", "code", "what", "reason"),
    [
        ("", 1, "benchmarks.vllm_throughput", "it ended with exit code 1"),
        ('{"cells": [', None, "benchmarks.vllm_throughput", "its time was up"),
        (json.dumps(WRITTEN), None, "the end of benchmarks.vllm_throughput", "its time was up"),
    ],
)
def test_a_benchmark_of_vllm_that_fails_says_why(
    monkeypatch, tmp_path, written, code, what, reason
):
    *found, problem = vllm_part(monkeypatch, tmp_path, written, code)
    assert len(found) == (3 if written.endswith("}") else 0)
    assert (problem["kind"], problem["what"]) == ("not run", what)
    assert problem["reason"].startswith(reason)
    assert "an engine said this" in problem["reason"]


def test_engines_are_not_started_without_the_time_for_it(monkeypatch, tmp_path):
    monkeypatch.delattr(vllm_cells, "run_python")
    (record,) = vllm_cells.run(30.0, tmp_path)
    assert record["reason"] == "30 s were left, and two engines must start"


def test_vllm_has_its_tests_and_then_its_throughput(monkeypatch, tmp_path):
    given, seen = [suites.Job(Path("test_gpu.py"), "gpu")], []
    monkeypatch.setattr(suites, "vllm_jobs", lambda: given)
    monkeypatch.setattr(
        suites, "run_jobs", lambda jobs, seconds, folder: seen.append(seconds) or []
    )
    monkeypatch.setattr(vllm_cells, "run", lambda seconds, folder: seen.append(seconds) or [])
    options = gpu_check.parse(["--out", str(tmp_path)])
    check = gpu_check.Check(options, "it", gpu_check.Console())
    gpu_check._step(check, "vLLM")(200.0, tmp_path)
    assert seen == [pytest.approx(110.0), pytest.approx(200.0, abs=5.0)]


def test_the_other_parts_leave_vllm_time_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(suites, "vllm_jobs", list)
    assert gpu_check.shares_of(None, gpu=True) == gpu_check.SHARES
    assert "vLLM" not in gpu_check.shares_of("decoding", gpu=True)
    monkeypatch.setattr(suites, "vllm_jobs", lambda: ["a job"])
    shares = gpu_check.shares_of(None, gpu=True)
    assert list(shares) == [*gpu_check.SHARES, "vLLM"]
    assert 60 * gpu_check.MINUTES * shares["vLLM"] / sum(shares.values()) > 170


def test_the_two_halves_are_the_whole(monkeypatch):
    monkeypatch.setattr(suites, "vllm_jobs", lambda: ["a job"])
    halves = [list(gpu_check.shares_of(half, gpu=True)) for half in gpu_check.HALVES]
    assert {name for half in halves for name in half} == {*gpu_check.SHARES, "vLLM"}
    assert all(half[0] == "device" for half in halves)
    assert gpu_check.shares_of("kernels", gpu=False) == {"tests": 1}
    assert gpu_check.shares_of("decoding", gpu=False) == {}
    assert gpu_check.shares_of(None, gpu=False) == {"tests": 1}


def test_rates_that_were_not_measured_are_said_to_be_assumed():
    about = {"date": "today", "seconds": 1.0, "command": "it", "machine": {
        "versions": {}, "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "multiprocessors": 1,
        "memory_gb": 85, "l2_mb": 50, "cuda": "13", "driver": "1"}}  # fmt: skip
    text = "\n".join(markdown([], about))
    assert "rates were not measured; floors assume a copy of 3.0 TB/s" in text
