"""The benchmark of PPO-MCTS: its naive version grows the same trees, or nothing is reported."""

import json

import pytest
import torch

from benchmarks import mcts
from benchmarks.baselines import EOS, Models, Shape
from benchmarks.naive_mcts import NaiveSearch
from guided_decode.search import MCTS, load_generator

SMALL = Shape(layers=2, hidden=32, intermediate=48, heads=2, vocab=97)
ARGUMENTS = ["--simulations", "20", "6", "--prefix", "12", "--tokens", "2", "--rounds", "2",
             "--threads", "1"]  # fmt: skip


@torch.no_grad()
def test_naive_and_ours_grow_the_same_trees():
    models = Models.random(SMALL, cache_tokens=2000)
    generator = load_generator(models.policy, eos_token_ids=[EOS], cache_tokens=2000)
    own, prompt = mcts.Search(models, generator), list(range(3, 20))
    for settings in (MCTS.published(30), MCTS(30, k=3, c_puct=2.0, look_past=True)):
        naive = NaiveSearch(models, prompt, settings)
        theirs = [naive.step() for _ in range(4)]
        _, ours = own.seconds(prompt, settings, 4)
        assert ours == theirs
        assert any(len(each) > 1 for each in ours)


def test_a_run_writes_its_table_and_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mcts, "Shape", lambda: SMALL)
    assert mcts.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "naive / batched" in shown
    written = json.loads((tmp_path / "mcts.json").read_text())
    assert [(case["simulations"], case["prefix"]) for case in written["cases"]] == [
        (20, 12), (6, 12)
    ]  # fmt: skip
    for case in written["cases"]:
        assert all(len(each) == 2 and min(each) > 0 for each in case["seconds"].values())
        # At most a token of each model for each simulation, and the prompt's last one.
        assert 1 < case["tokens_forwarded_a_token"]["ours"] <= 2 * (case["simulations"] + 1)
    # The target of batched leaves is for 20 simulations.
    assert len(written["targets"]) == 3
    assert "faster than naive" in (tmp_path / "mcts.txt").read_text()


def test_nothing_is_reported_where_the_trees_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mcts, "Shape", lambda: SMALL)
    monkeypatch.setattr(NaiveSearch, "_select", lambda self, node: 0)
    assert mcts.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    assert "took other ways in the tree of token 0" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_simulations_that_are_missing_are_found():
    visits = {"naive": [{1: 4}], "ours": [{1: 4}], "batched": [{1: 3}]}
    with pytest.raises(mcts.DisagreementError, match="batched leaves made 3 simulations"):
        mcts.check(mcts.Case(4, 9), visits, 0)
