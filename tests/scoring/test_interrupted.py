"""What must not leak into answers: interruptions, the caller's modes, scores that overflow."""

import itertools
import sys

import pytest
import torch
import transformers

from guided_decode import GuidanceConfig, PrefixHandle, Scores, guide, load_scorer
from guided_decode.cache.slot_tables import SlotTables
from guided_decode.forward.modes import without_autograd
from guided_decode.guidance.step import guide_rows
from tests import models


def critic(cache_tokens=2048):
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic", cache_tokens=cache_tokens)


@pytest.mark.parametrize("at", [1, 2])
def test_an_interruption_while_tables_are_closed_changes_no_later_answer(monkeypatch, at):
    scorer, calls = critic(), []
    close = SlotTables.close_row

    def interrupted(self, row):
        close(self, row)
        calls.append(row)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(SlotTables, "close_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score([[5, 6, 7], [8, 9]], torch.tensor([[3, 4], [3, 4]]))
    monkeypatch.undo()
    handles = [PrefixHandle(ids) for ids in ([9], *models.prompts([20, 20]))]
    candidates = torch.tensor([[3, 4]] * 3)
    scorer.score(handles, candidates)
    for handle in handles:
        handle.append(3)
    expected = critic().score([handle.tokens for handle in handles], candidates)
    torch.testing.assert_close(scorer.score(handles, candidates).values, expected.values)
    scorer.cache.check()


def test_a_handle_whose_row_was_interrupted_leaves_no_table_behind(monkeypatch):
    scorer = critic()
    monkeypatch.setattr(type(scorer.cache.tree), "match", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scorer.score([PrefixHandle([5, 6])], torch.tensor([[3]]))
    monkeypatch.undo()
    scorer.cache.check()


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled()


def test_an_interruption_at_any_call_leaves_the_callers_modes():
    kept = []  # As a notebook keeps the last traceback, with all that its frames hold.

    def interrupted(at):
        """Raises at the at-th call or return inside; whether there was one."""
        counted = itertools.count(1)

        def interrupt(frame, event, argument):
            if frame.f_code is not interrupted.__code__ and next(counted) == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            asked()
        except KeyboardInterrupt as error:
            kept.append(error)
            return True
        finally:
            sys.setprofile(None)
        return False

    asked = without_autograd(modes)
    with torch.enable_grad():
        before = modes()
        asked()
        at = next(n for n in itertools.count(1) if not interrupted(n) or modes() != before)
        assert modes() == before, f"lost at call {at}"
    assert at > 50


def test_autocast_of_the_caller_changes_no_score():
    scorer, rows, candidates = critic(), [[5, 6, 7, 8]], torch.tensor([[3, 4]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scorer.score(rows, candidates).values
    torch.testing.assert_close(inside, critic().score(rows, candidates).values)


def test_the_check_at_load_runs_with_the_smallest_cache():
    bloom = transformers.BloomForSequenceClassification(
        transformers.BloomConfig(
            vocab_size=101, hidden_size=48, n_layer=2, n_head=4, num_labels=1, pad_token_id=0
        )
    ).eval()
    with pytest.raises(ValueError, match="packed form"):
        load_scorer(bloom, kind="reward-model", cache_tokens=5)


OVERFLOWS = [
    (torch.float32, [[3e38, -3e38]], -3e38, 1.0),
    (torch.float16, [[50.0, 0.0]], 0.0, 2000.0),
]


@pytest.mark.parametrize(("dtype", "values", "baseline", "beta"), OVERFLOWS)
def test_finite_scores_whose_logits_overflow_are_refused(dtype, values, baseline, beta):
    scores = Scores(torch.tensor(values), torch.tensor([baseline]))
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        guide(
            torch.zeros(1, 5, dtype=dtype),
            torch.tensor([[0, 1]]),
            scores,
            GuidanceConfig(top_k=2, beta=beta),
        )


def test_finite_scores_whose_logits_overflow_leave_the_row_unguided(monkeypatch):
    scorer, logits = critic(), torch.randn(1, 101)
    answer = Scores(torch.tensor([[3e38, -3e38]]), torch.tensor([-3e38]))
    monkeypatch.setattr(scorer, "score", lambda *_: answer)
    config = GuidanceConfig(top_k=2)
    guided = guide_rows(scorer, logits, [[5]], config, on_error="passthrough")
    assert torch.equal(guided, logits)
    assert scorer.stats.passthroughs == 1


def test_beta_beyond_float32_and_an_unknown_on_error_are_refused():
    with pytest.raises(ValueError, match=r"beta=1e\+39"):
        GuidanceConfig(beta=1e39)
    with pytest.raises(ValueError, match="on_error='ignore'"):
        guide_rows(critic(), torch.zeros(1, 101), [[5]], GuidanceConfig(), on_error="ignore")
    with pytest.raises(ValueError, match="1 prefixes came with logits of 2 rows"):
        guide_rows(critic(), torch.zeros(2, 101), [[5]], GuidanceConfig(), on_error="passthrough")
