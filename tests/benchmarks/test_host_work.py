"""The benchmark of the host's work holds guided logits to the rule, and tells its parts apart."""

import json

import pytest

from benchmarks import host_step, host_work
from benchmarks.host_step import Case, Decoding, DisagreementError


def test_tiny_cases_are_timed_by_part(tmp_path):
    words = ["--rows", "1", "3", "--prefix", "8", "--k", "2", "--rounds", "2", "--steps", "3"]
    assert host_work.main([*words, "--full", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "host_work.json").read_text())
    sizes = [(case["rows"], case["full"]) for case in written["cases"]]
    assert sizes == [(1, False), (3, False), (1, True), (3, True)]
    for case in written["cases"]:
        spent = case["microseconds_a_step"]
        parts = [spent[part] for part in ("before", "look_up", "after", "forward")]
        assert min(parts) > 0
        assert case["other"] is None
    assert "Microseconds of the host" in (tmp_path / "host_work.txt").read_text()


def test_a_full_pool_evicts_and_another_does_not():
    for full in (False, True):
        decoding = Decoding(Case(2, 8, 4, full), 12)
        decoding.turn(12)
        assert (decoding.scorer.stats.evictions > 0) is full


def test_ratios_are_of_one_round():
    def turns(*totals):
        return [host_step.Turn(look_up=total) for total in totals]

    result = host_work.Result(Case(1, 8, 2), turns(10.0, 20.0), turns(30.0, 50.0))
    assert result.ratios == [3.0, 2.5]


def test_logits_that_are_not_the_rules_are_not_timed(monkeypatch):
    decoding = Decoding(Case(2, 8, 4), 4)
    decoding.turn(2)
    monkeypatch.setattr(host_step, "value", lambda token, position: (token * 0.1).float())
    with pytest.raises(DisagreementError, match="2 rows, prefix 8, k 4 at step 2"):
        decoding.turn(1)
