"""The benchmark's ways give the same guided logits, and it refuses to report otherwise."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import baselines, lookahead, pairs, trunk_lookahead, vllm_throughput
from benchmarks.baselines import Copied, Models, Ours, Recomputed, Shape
from guided_decode import GuidanceConfig
from guided_decode.integrations.transformers import GuidedDecoding

SMALL = Shape(layers=2, hidden=32, intermediate=48, heads=2, vocab=97)


@pytest.fixture(scope="module")
def small():
    with torch.no_grad():
        return Models.random(SMALL, cache_tokens=2000)


@pytest.fixture
def ways(small):
    prompts = torch.randint(3, SMALL.vocab, (3, 70), generator=torch.Generator().manual_seed(0))
    config = GuidanceConfig(top_k=4)
    return {
        "ours": Ours(small, prompts, config),
        "copied": Copied(small, prompts, config),
        "recomputed": Recomputed(small, prompts, config, sample=3),
    }


def test_all_ways_agree(ways):
    assert 0 < pairs.check_equal(pairs.Case(3, 70, 4), ways, steps=6) < 1e-5


def test_a_way_that_differs_is_found(ways):
    ways["copied"].baseline += 1e-3
    with pytest.raises(pairs.DisagreementError, match="ours and copied differ by 0.001 at step 0"):
        pairs.check_equal(pairs.Case(3, 70, 4), ways)


def test_recomputation_scales_the_rows_that_it_times(small):
    prompts = torch.randint(3, SMALL.vocab, (3, 9))
    way = Recomputed(small, prompts, GuidanceConfig(top_k=4))
    assert way.next_logits().shape == (1, SMALL.vocab)
    assert way.seconds(2) > 0
    assert way.cache.get_seq_length() == 9  # it stays where it stands


def test_a_run_writes_its_table_and_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookahead, "Shape", lambda: SMALL)
    arguments = ["--batch", "1", "2", "--prefix", "12", "--k", "2", "--pairs", "3"]
    assert lookahead.main([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "lookahead.json").read_text())
    assert [case["batch"] for case in written["cases"]] == [1, 2]
    assert all(len(case["seconds"]["ours"]) == 3 for case in written["cases"])
    verdict = written["targets"][-1]
    assert ("not met" in shown) == (not verdict["met"])
    assert "faster than copied and recomputed" in (tmp_path / "lookahead.txt").read_text()


def test_nothing_is_reported_where_the_ways_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookahead, "Shape", lambda: SMALL)
    monkeypatch.setattr(
        baselines.Copied, "next_logits", lambda way: way.policy_logits() + 1.0, raising=True
    )
    arguments = ["--batch", "1", "--prefix", "12", "--k", "2", "--pairs", "1"]
    assert lookahead.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "nothing is reported" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_trunks_benchmark_writes_its_table_and_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trunk_lookahead, "Shape", lambda: SMALL)
    arguments = ["--batch", "1", "2", "--prefix", "12", "--k", "3", "--rounds", "2"]
    assert trunk_lookahead.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "trunk / plain" in capsys.readouterr().out
    written = json.loads((tmp_path / "trunk_lookahead.json").read_text())
    assert [result["case"]["batch"] for result in written["results"]] == [1, 2]
    for result in written["results"]:
        assert {way: len(each) for way, each in result["seconds"].items()} == {
            "plain": 2, "trunk": 2, "two models": 2,
        }  # fmt: skip
    assert "trunk / plain" in (tmp_path / "trunk_lookahead.txt").read_text()


def test_the_trunks_benchmark_reports_nothing_where_its_ways_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trunk_lookahead, "Shape", lambda: SMALL)
    other = lambda scorer, config: GuidedDecoding(scorer, replace(config, beta=-40.0))  # noqa: E731
    monkeypatch.setattr(trunk_lookahead, "GuidedDecoding", other)
    arguments = ["--batch", "1", "--prefix", "12", "--k", "3", "--rounds", "1"]
    assert trunk_lookahead.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "nothing is reported" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def turns(seconds, host=None, gaps=()):
    return [vllm_throughput.Timing(s, 64, list(gaps), host) for s in seconds]


def test_ratios_of_the_vllm_benchmark_are_taken_within_their_round():
    cell = vllm_throughput.Cell(32, 20)
    cell.turns = {way: turns([1.0, 4.0], host=70.0) for way in vllm_throughput.USUAL}
    cell.turns["plain"] = turns([1.0, 4.0], gaps=[0.002])
    cell.turns["unused"] = turns([1.1, 4.0])
    assert cell.slowdown("unused") == pytest.approx([1.1, 1.0])
    assert cell.latency("plain") == pytest.approx(2.0)
    assert cell.host("unused") is None
    (unused, host) = vllm_throughput.verdicts([cell])
    assert unused == (
        "prompts of 20, concurrency 32: loaded but unused ≤ 1.05× plain: 1.050 (2 pairs)",
        True,
    )
    assert host == ("prompts of 20, concurrency 32: host work < 60 µs a row: 70", False)


def test_who_asks_for_guidance_in_the_vllm_benchmark():
    assert vllm_throughput.requests("unused", 2) == [None, None]
    assert vllm_throughput.requests("k 4", 1) == [{"guide": 1, "guide_top_k": 4}]
    half = vllm_throughput.requests("half k 8", 4)
    assert [extra is None for extra in half] == [False, True, False, True]


def test_prompts_of_the_vllm_benchmark_differ_at_their_end_only():
    cell = vllm_throughput.Cell(2, 40)
    one, two = (vllm_throughput.draw_prompts(cell, turn) for turn in ("one", "two"))
    assert [len(prompt) for prompt in one] == [40, 40]
    assert [p[: -vllm_throughput.NEW] for p in one] == [p[: -vllm_throughput.NEW] for p in two]
    assert one != two
    # Else a later cell would find its text in the scorer's cache.
    for other in (vllm_throughput.Cell(4, 40), vllm_throughput.Cell(2, 40, full=True)):
        drawn = vllm_throughput.draw_prompts(other, "one")
        assert not {*map(tuple, one)} & {*map(tuple, drawn)}
