"""Two checkouts' guided tokens, in turn: which case is slower, and a run of both."""

import json

import pytest

from benchmarks.lookahead_against import Compared, main, verdict
from benchmarks.pairs import Case
from tests import ROOT

CASE = Case(1, 8, 4)


def turns(ours, plain=(1.0, 1.0, 1.0)):
    return [{"ours": a, "plain": b} for a, b in zip(ours, plain, strict=True)]


@pytest.mark.parametrize(
    ("here", "plain", "slower"),
    [
        ([2.0, 2.2, 2.1], [1.0, 1.0, 1.0], True),
        ([2.0, 2.02, 2.0], [1.0, 1.0, 1.0], False),
        # The machine was slower, and not the checkout.
        ([2.4, 2.4, 2.4], [1.3, 1.3, 1.3], False),
        ([1.0, 1.0, 3.0], [1.0, 1.0, 1.0], False),
    ],
)
def test_a_case_is_slower_by_more_than_plain_decoding_tells(here, plain, slower):
    found = Compared(CASE, turns(here, plain), turns([2.0, 2.0, 2.0]))
    assert found.is_slower is slower
    said = "slower here: batch 1, prefix 8, k 4" if slower else "no case is slower here"
    assert verdict([found]) == said


@pytest.mark.slow
def test_this_checkout_takes_turns_with_itself(tmp_path, capfd):
    words = [str(ROOT), "--batch", "1", "--prefix", "8", "--k", "4", "--rounds", "2"]
    assert main([*words, "--threads", "1", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "lookahead_against.json").read_text())
    (case,) = written["cases"]
    assert len(case["here"]) == len(case["there"]) == 2
    assert all(turn["ours"] > 0 < turn["plain"] for turn in case["here"] + case["there"])
    assert str(ROOT) not in (tmp_path / "lookahead_against.txt").read_text()
    assert "here / there" in capfd.readouterr().out
