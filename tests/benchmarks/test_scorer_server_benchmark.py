"""The benchmark of the scorer server holds its answers to the local scorer's, and counts bytes."""

import json

import pytest
from rich.console import Console

from benchmarks import scorer_server
from benchmarks.report import environment
from benchmarks.scorer_server import Case, DisagreementError, run_case
from guided_decode import load_scorer
from tests import models
from tests.serving.served import client, critic, served


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scorer_server, "_VOCAB", models.VOCAB)


def test_a_case_is_timed_and_what_it_sends_does_not_grow_with_the_prefix(tmp_path):
    with served(critic()) as server:
        remote, local = client(server), critic()
        results = [run_case(local, remote, Case(3, prefix, 4), 5) for prefix in (16, 400)]
    for result in results:
        assert len(result.added) == len(result.local) == 5
        assert result.difference < 1e-4
        assert all(0 < wire < whole for wire, whole in zip(result.wire, result.remote, strict=True))
        # Values and baselines of three rows, and a few bytes around them.
        assert 3 * 5 * 4 < result.bytes_received < 3 * 5 * 4 + 40
    # A row's length may take two bytes more.
    assert abs(results[0].bytes_sent - results[1].bytes_sent) <= 3 * 4
    scorer_server.write(results, environment("the test", {}), tmp_path)
    written = json.loads((tmp_path / "scorer_server.json").read_text())
    assert [case["prefix"] for case in written["cases"]] == [16, 400]
    assert written["cases"][0]["allowed_ms"] == 1.045
    assert "what the server adds" in (tmp_path / "scorer_server.txt").read_text()
    Console(width=140).print(scorer_server.table(results))


def test_answers_that_differ_are_not_timed():
    other = load_scorer(models.tiny("llama", "token", seed=9), kind="verl-critic")
    with served(other) as server:
        remote = client(server)
        with pytest.raises(DisagreementError, match=r"Case\(rows=2, prefix=9, k=3\) differs by"):
            run_case(critic(), remote, Case(2, 9, 3), 5)
