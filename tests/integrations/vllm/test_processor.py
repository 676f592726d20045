"""The processor's edges: scorers that fail, and what no request may do to others."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from guided_decode import GuidanceConfig
from tests import PATIENCE, models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.vllm_server import until
from tests.integrations.vllm.vllm_steps import (
    CONFIG,
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
from guided_decode.integrations.vllm.metrics import _DELAY, Metrics  # isort: skip
from guided_decode.integrations.vllm.request import UNGUIDED, Pruning, Request  # isort: skip


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


def test_a_row_whose_value_is_too_low_gets_the_token_that_ends_it(scorer):
    end, first = 77, 2
    live = rows()
    brute = oracle.Values(models.tiny("llama", "token"))
    guiding = engine(scorer)
    for placed in live:
        placed.row.history.extend([11, 12])
    values = brute([placed.row.history.tokens.tolist() for placed in live])
    low = sorted(values)[2] - 1e-3
    for placed, is_guided in zip(live, (True, False, True, False), strict=True):
        own = (CONFIG if is_guided else UNGUIDED).changed(abstain=low, abstain_after=first)
        placed.row.request = Request(own, (models.EOS, end), end_token=end)
    live[2].row.request = Request(live[2].row.request.config.changed(abstain_after=first + 1),
                                  (models.EOS, end), end_token=end)  # fmt: skip
    logits = step_logits()
    scorer.stats.reset()
    for _ in range(2):
        guided = guiding.step(logits.clone(), live)
        ended = [i for i in range(4) if (guided[i] > -torch.inf).sum() == 1 and i != 2]
        assert ended == [i for i in range(4) if values[i] < low and i != 2]
        assert 0 < len(ended) < 3
        assert all(guided[i].argmax() == end for i in ended)
    assert guiding.counts.abstained_rows == len(ended)
    for i in (1, 3):
        if i not in ended:
            assert torch.equal(guided[i], logits[i])
    assert scorer.stats.passthroughs == 0


def test_a_row_that_only_abstains_has_no_candidates_and_one_that_fails_goes_on(scorer):
    live = rows()
    request = Request(UNGUIDED.changed(abstain=1e9), (models.EOS, 77), end_token=77)
    for placed in live:
        placed.row.history.append(13)
        placed.row.request = request
    logits = step_logits()
    scorer.stats.reset()
    failing = engine(Failing(scorer, "raises"))
    assert torch.equal(failing.step(logits.clone(), live), logits)
    assert failing.counts.abstained_rows == 0
    assert scorer.stats.passthroughs == len(live)
    guided = engine(scorer).step(logits.clone(), live)
    assert guided.argmax(-1).tolist() == [77] * len(live)
    assert scorer.stats.candidate_tokens == 0


def test_an_end_token_that_the_policy_has_not_ends_nobody(scorer, tmp_path):
    live = rows()
    config = CONFIG.changed(abstain=1e9)
    for placed in live:
        placed.row.history.append(13)
        placed.row.request = Request(config, (models.EOS, 9999), end_token=9999)
    # The log asks for the value as well.
    guiding = engine(scorer, value_log=str(tmp_path / "values.jsonl"), value_log_every=1)
    logits = step_logits()
    guided = guiding.step(logits.clone(), live)
    assert torch.equal(guided, engine(scorer).step(logits.clone(), live))
    assert (guiding.counts.abstained_rows, guiding.counts.clamps) == (0, len(live))


def test_a_response_that_is_over_is_not_read_in_its_step_too_many(scorer):
    live = rows()
    config = UNGUIDED.changed(abstain=1e9)
    for placed in live:
        placed.row.request = Request(config, (models.EOS, 77), end_token=77)
        placed.row.history.append(models.EOS if placed.at < 2 else 13)
    scorer.stats.reset()
    guiding, logits = engine(scorer), step_logits()
    guided = guiding.step(logits.clone(), live)
    assert torch.equal(guided[:2], logits[:2])
    assert guided[2:].argmax(-1).tolist() == [77, 77]
    assert guiding.counts.abstained_rows == 2
    assert scorer.stats.rows_scored == 2


def test_rows_are_guided_where_their_value_gate_is_open(scorer):
    live = rows()
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    prefixes = [placed.row.history.tokens.tolist() for placed in live]
    now = brute.values([[*prefix, 14] for prefix in prefixes])
    low = sorted(now)[2] - 1e-3
    falls = [a - b for a, b in zip(brute.values(prefixes), now, strict=True)]
    config = CONFIG.changed(value_gate=low, value_gate_fall=max(sorted(falls)[2] - 1e-3, 0.0))
    opened = [i for i in range(4) if now[i] < low or falls[i] > config.value_gate_fall]
    for placed in live:
        placed.row.request = Request(config, (models.EOS,))
    guiding, logits = engine(scorer), step_logits()
    guiding.step(logits.clone(), live)
    for placed in live:
        placed.row.history.append(14)
    scorer.stats.reset()
    guided = guiding.step(logits.clone(), live)
    assert 0 < len(opened) < 4
    assert scorer.stats.rows_gated == 4 - len(opened)
    for i, placed in enumerate(live):
        expected = brute.row(placed.row.history.tokens.tolist(), logits[i], config, [models.EOS],
                             len(prefixes[i]))  # fmt: skip
        oracle.assert_row_equal(guided[i], expected)
    # Nobody remembers the values of the step before, as after a preemption.
    for placed in live:
        placed.row.trail = type(placed.row.trail)(placed.row.prompt_length)
    again = guiding.step(logits.clone(), live)
    torch.testing.assert_close(again, guided, rtol=0, atol=1e-5)


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


def test_a_row_that_a_step_leaves_out_comes_back_with_its_last_value():
    from vllm.v1.sample.logits_processor import BatchUpdate

    from guided_decode.integrations.vllm.rows import BatchRows

    config = CONFIG.changed(value_gate_fall=0.5)
    batch = BatchRows(lambda params: Request(config, (models.EOS,)))

    def update(added=(), removed=()):
        batch.update(BatchUpdate(batch_size=4, removed=removed, added=added, moved=[]))

    outputs = [[], []]
    update([(i, None, PROMPTS[0], output) for i, output in enumerate(outputs)])
    for output, token in zip(outputs, (11, 12), strict=True):
        output.append(token)
    for placed in batch.rows():
        row = placed.row
        row.trail.prompt_length = row.prompt_length
        row.trail.add(row.history, len(row.history), float(placed.at))
    update(removed=[0, 1])
    assert batch.rows() == []
    # In other lists, as after a preemption, at other places, and one that was never there.
    update([(2, None, list(PROMPTS[0]), [12, 13]), (0, None, PROMPTS[0], [11, 14]),
            (1, None, PROMPTS[0], [15, 13])])  # fmt: skip
    length = len(PROMPTS[0]) + 1
    found = {placed.at: placed.row for placed in batch.rows()}
    assert [found[i].trail.at(found[i].history, length) for i in range(3)] == [0.0, None, 1.0]
    assert found[2].history.tokens.tolist() == [*PROMPTS[0], 12, 13]


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


def test_many_steps_are_published_together_a_moment_later(scorer, monkeypatch):
    published, plain = [], Metrics._publish

    guiding, logits = engine(scorer), step_logits()

    def publish(self, gauges):
        plain(self, gauges)
        if self is guiding._metrics:
            published.append(gauges)

    monkeypatch.setattr(Metrics, "_publish", publish)
    begun = time.monotonic()
    for _ in range(5):
        guiding.step(logits.clone(), rows())
    took = time.monotonic() - begun
    until(lambda: guiding._metrics._published["guided_rows"] == 5 * len(PROMPTS))
    assert 1 <= len(published) <= 1 + took / _DELAY
    assert published[-1] == {"live_rows": 4, "groups": 0}
    # What comes after that is published as well.
    guiding.release([])
    until(lambda: published[-1] == {"live_rows": 0, "groups": 0})


def test_a_step_where_no_thread_is_to_be_had_publishes_itself(scorer, monkeypatch):
    def fail(self):
        raise RuntimeError("can't start new thread")

    guiding, logits = engine(scorer), step_logits()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for steps in (1, 2):
            guiding.step(logits.clone(), rows())
            assert guiding._metrics._published["guided_rows"] == steps * len(PROMPTS)
    guiding.step(logits.clone(), rows())
    until(lambda: guiding._metrics._published["guided_rows"] == 3 * len(PROMPTS))


def test_what_is_due_when_the_process_ends_is_published(tmp_path):
    code = """
from guided_decode.integrations.vllm.metrics import Metrics, StepCounts
from guided_decode.stats import ScorerStats

counts = StepCounts()
metrics = Metrics(counts, ScorerStats(), log_every=0)
counts.guided_rows = 7
metrics.publish_soon(live_rows=1, groups=0)
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=PATIENCE)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert registry.get_sample_value("guided_decode_guided_rows_total") == 7
