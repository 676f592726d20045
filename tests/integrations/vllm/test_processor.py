"""The processor's edges: scorers that fail, and what no request may do to others."""

from __future__ import annotations

import logging

import pytest
import torch

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.vllm_steps import (
    CPU,
    PROMPTS,
    Failing,
    brute_rows,
    built,
    engine,
    rows,
    step_logits,
)

from guided_decode.integrations.vllm import ValueGuidedLogitsProcessor  # isort: skip
from guided_decode.integrations.vllm.request import Pruning  # isort: skip


@pytest.fixture(scope="module")
def scorer():
    return built().scorer


@pytest.mark.parametrize("fault", ["nan", "inf", "nan baseline"])
def test_a_row_whose_scores_are_no_numbers_goes_on_as_it_came(scorer, fault, caplog):
    logits = step_logits()
    scorer.stats.reset()
    failing = engine(Failing(scorer, fault))
    for _ in range(3):
        guided = failing.step(logits.clone(), rows())
        assert torch.equal(guided[1], logits[1])
        for i, expected in enumerate(brute_rows(logits)):
            if i != 1:
                oracle.assert_row_equal(guided[i], expected)
    assert scorer.stats.passthroughs == 3
    assert caplog.text.count("rows go on unguided because scoring failed") == 1


def test_a_scorer_that_raises_leaves_every_row_as_it_came(scorer, caplog):
    logits = step_logits()
    scorer.stats.reset()
    failing = engine(Failing(scorer, "raises"))
    for _ in range(3):
        assert torch.equal(failing.step(logits.clone(), rows(unguided=[2])), logits)
    assert scorer.stats.passthroughs == 9
    assert caplog.text.count("rows go on unguided because scoring failed: the scorer broke") == 1


@pytest.mark.parametrize("own", [{}, {"on_error": "raise", "max_beta": 5.0}])
def test_a_row_that_comes_with_every_token_forbidden_is_counted_and_said(scorer, own, caplog):
    logits = step_logits()
    logits[1] = -torch.inf
    guiding = engine(scorer, **own)
    scorer.stats.reset()
    for _ in range(2):
        guided = guiding.step(logits.clone(), rows())
        assert torch.equal(guided[1], logits[1])
        for i in (0, 2, 3):
            oracle.assert_row_equal(guided[i], brute_rows(logits)[i])
    assert guiding.scorer.stats.passthroughs == 2
    assert caplog.text.count("to sample") == 1


def test_ids_that_only_a_padded_policy_has_are_no_candidates(scorer):
    """Qwen2.5: 152,064 logits of a policy against a scorer of 151,936."""
    known = step_logits()
    padding = torch.full((len(PROMPTS), 27), -9.0)
    logits = torch.cat([known, padding], -1)
    scorer.stats.reset()
    guided = engine(scorer).step(logits.clone(), rows(unguided=[3]))
    expected = engine(scorer).step(known.clone(), rows(unguided=[3]))
    assert torch.equal(guided[:3, : models.VOCAB], expected[:3])
    assert bool((guided[:3, models.VOCAB :] == -torch.inf).all())
    assert torch.equal(guided[3], logits[3])
    assert scorer.stats.passthroughs == 0
    assert scorer.stats.rows_scored == 6


@pytest.mark.parametrize("own", [{}, {"on_error": "raise", "max_beta": 5.0}])
def test_a_row_whose_likeliest_id_the_scorer_lacks_goes_on_as_it_came(scorer, own):
    logits = torch.full((len(PROMPTS), models.VOCAB + 27), -torch.inf)
    logits[:, models.VOCAB + 3] = 1.0
    guiding = engine(scorer, **own)
    scorer.stats.reset()
    assert torch.equal(guiding.step(logits.clone(), rows()), logits)
    assert scorer.stats.passthroughs == len(PROMPTS)


def test_siblings_whose_value_is_no_number_are_not_compared(scorer):
    pruning = Pruning("a-group-name", 4, 1, 2, 77)
    live = rows(pruning)
    failing = engine(Failing(scorer, "raises"))
    logits = step_logits()
    for _ in range(2):
        for placed in live:
            placed.row.history.append(11)
    assert torch.equal(failing.step(logits.clone(), live), logits)
    assert not any(placed.row.sibling.is_pruned for placed in live)


def test_a_server_may_want_failures_to_end_it(scorer):
    with pytest.raises(RuntimeError, match="the scorer broke"):
        engine(Failing(scorer, "raises"), on_error="raise", max_beta=5.0).step(
            step_logits(), rows()
        )
    with pytest.raises(ValueError, match="NaN or infinity for rows \\[1\\]"):
        engine(Failing(scorer, "nan"), on_error="raise", max_beta=5.0).step(step_logits(), rows())


def test_an_error_of_the_device_ends_the_engine(scorer):
    class Broken(Failing):
        def score(self, prefixes, candidates):
            raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        engine(Broken(scorer, "")).step(step_logits(), rows())


def test_tokens_that_vllm_does_not_hand_over_leave_the_row_alone(scorer, caplog):
    from vllm.v1.sample.logits_processor import BatchUpdate

    config = vllm_parts.vllm_config(vllm_parts.scorer_config())
    processor = ValueGuidedLogitsProcessor(config, CPU, False)
    asks = vllm_parts.params(8, {"guide": 1, "guide_top_k": 4})
    placeholders = [-1]
    added = [(0, asks, None, []), (1, asks, PROMPTS[1], placeholders), (2, asks, PROMPTS[2], [])]
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    logits = step_logits()
    guided = processor.apply(logits.clone())
    assert torch.equal(guided[[0, 1, 3]], logits[[0, 1, 3]])
    oracle.assert_row_equal(guided[2], brute_rows(logits)[2])
    assert processor.engine.counts.unguided_rows == 2
    assert "load the processor by --logits-processors" in caplog.text
    placeholders[0] = 14  # repaired
    guided = processor.apply(logits.clone())
    assert not torch.equal(guided[1], logits[1])


def test_what_a_request_contains_never_raises_in_the_worker(caplog):
    caplog.set_level(logging.WARNING)
    own = built(top_k=8, max_top_k=8)
    odd = [{"guide_top_k": "many"}, {"guide_rule": []}, {"guide": {}}, {"guide_keep": -1},
           {"guide_x": None}, {"guide_top_k": 9}]  # fmt: skip
    for extra in odd:
        own.admit(vllm_parts.params(4, extra))
    assert own.counts.clamps == len(odd)
    assert caplog.text.count("a request asked for more than it gets") == 1


def test_a_request_that_the_scorer_refuses_does_not_end_a_server_that_may_raise(scorer):
    live = rows()
    live[1].row.history.extend([7] * models.POSITIONS)
    logits = step_logits()
    guided = engine(scorer, on_error="raise", max_beta=5.0).step(logits.clone(), live)
    assert torch.equal(guided[1], logits[1])
    oracle.assert_row_equal(guided[0], brute_rows(logits)[0])


def test_a_request_without_a_token_left_does_not_end_a_server_that_may_raise(scorer):
    before = scorer.stats.passthroughs
    logits = step_logits()
    logits[1] = -torch.inf
    guided = engine(scorer, on_error="raise", max_beta=5.0).step(logits.clone(), rows())
    assert torch.equal(guided[1], logits[1])
    oracle.assert_row_equal(guided[0], brute_rows(logits)[0])
    assert scorer.stats.passthroughs == before + 1


def test_a_neighbour_with_more_candidates_changes_nothing():
    small = built(cache_tokens=80).scorer
    prompt = models.prompts([70])[0]
    narrow, wide = GuidanceConfig(top_k=4), GuidanceConfig(top_k=64)
    logits = step_logits()[:2]
    from guided_decode.guidance.step import guide_rows

    alone = guide_rows(small, logits[:1], [prompt], narrow)
    both = guide_rows(small, logits, [prompt, prompt], [narrow, wide], on_error="passthrough")
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)
    assert torch.equal(both[1], logits[1])


def test_a_log_of_values_that_cannot_be_written_stops_nothing(scorer, caplog):
    logging_engine = engine(scorer, value_log="/dev/full", value_log_every=1)
    logits = step_logits()
    for _ in range(2):
        guided = logging_engine.step(logits.clone(), rows())
        oracle.assert_row_equal(guided[0], brute_rows(logits)[0])
    assert caplog.text.count("values are no longer logged to /dev/full") == 1
