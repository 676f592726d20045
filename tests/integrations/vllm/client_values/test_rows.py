"""What a step keeps of rows for their clients: of who asked alone, and nothing that failed."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests import models, oracle
from tests.integrations.vllm.vllm_steps import (
    CONFIG,
    PROMPTS,
    Failing,
    built,
    engine,
    rows,
    step_logits,
)

from guided_decode.integrations.vllm.client_values.records import decoded  # isort: skip
from guided_decode.integrations.vllm.client_values.store import ValueStore  # isort: skip
from guided_decode.integrations.vllm.client_values.texts import GrowingText  # isort: skip
from guided_decode.integrations.vllm.request import UNGUIDED, Request  # isort: skip
from guided_decode.integrations.vllm.slot_rows import SlotRows  # isort: skip

NAMES = [f"{'name of request':15}{i}" for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def scorer():
    return built().scorer


def named(configs, silent=()):
    """Rows whose clients asked, but for some."""
    live = rows()
    for i, (placed, config) in enumerate(zip(live, configs, strict=True)):
        name = None if i in silent else NAMES[i]
        placed.row.request = replace(placed.row.request, config=config, values_id=name)
    return live


def kept(store, i):
    """The records of a row's request, whose text is its prompt."""
    records = decoded(store.take(NAMES)).get(NAMES[i], [])
    assert all(each.text == GrowingText(PROMPTS[i]).digest() for each in records)
    return records


def stepped(scorer, live, **own):
    store, logits = ValueStore(), step_logits()
    engine(scorer, store=store, **own).step(logits.clone(), live)
    return store, logits


def test_a_guided_row_has_its_value_and_the_advantages_of_its_candidates(scorer):
    scorer.stats.reset()
    store, logits = stepped(scorer, named([CONFIG] * 4, silent=[1, 2, 3]))
    assert len(store) == 1
    (record,) = kept(store, 0)
    values = oracle.Values(models.tiny("llama", "token"))
    value = values([PROMPTS[0]])[0]
    assert record.value == pytest.approx(value, abs=1e-5)
    chosen = oracle.candidates(logits[0].tolist(), CONFIG.top_k, CONFIG.top_p)
    for token, after in zip(chosen, values.after(PROMPTS[0], chosen), strict=True):
        expected = 0.0 if token == models.EOS else after - value
        assert record.advantage(token) == pytest.approx(expected, abs=1e-5)
    assert record.advantage(int(logits[0].argmin())) is None
    # It was read on the way.
    assert scorer.stats.rows_scored == 4


# The default tail masks, so that a row without a weight is guided and scores nothing.
MASKED = CONFIG.changed(beta=0.0)


@pytest.mark.parametrize("config", [UNGUIDED, MASKED, CONFIG.changed(gate=1e-6)])
def test_a_row_whose_candidates_are_not_scored_has_its_value_alone(scorer, config):
    scorer.stats.reset()
    store, logits = stepped(scorer, named([config] * 4, silent=[1, 2, 3]))
    (record,) = kept(store, 0)
    expected = oracle.Values(models.tiny("llama", "token"))([PROMPTS[0]])[0]
    assert record.value == pytest.approx(expected, abs=1e-5)
    assert record.advantage(int(logits[0].argmax())) is None
    assert scorer.stats.rows_scored == 1
    assert scorer.stats.candidate_tokens == 0


class Refusing:
    """The tiny critic, which refuses candidates behind the first prompt."""

    def __init__(self, scorer):
        self._scorer = scorer

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def refusal(self, prefix, candidates):
        return "no room" if candidates and list(prefix.tokens) == PROMPTS[0] else None

    def score(self, prefixes, candidates):
        for prefix in prefixes:
            if self.refusal(prefix, candidates.shape[1]):
                raise ValueError("no room")
        return self._scorer.score(prefixes, candidates)


@pytest.mark.parametrize("fault", ["padded", "refused"])
@pytest.mark.parametrize("on_error", ["passthrough", "raise"])
def test_a_row_that_does_not_reach_the_scorer_has_its_value(scorer, fault, on_error):
    """Its likeliest token is beyond the scorer's vocabulary, or no candidate has room."""
    scorer.stats.reset()
    logits, live, store = step_logits(), named([CONFIG] * 4), ValueStore()
    if fault == "padded":
        logits = torch.cat([logits, torch.full((len(logits), 2), -torch.inf)], -1)
        logits[0, -1] = 100.0
    critic = Refusing(scorer) if fault == "refused" else scorer
    engine(critic, store=store, on_error=on_error, max_beta=10.0).step(logits, live)
    (record,) = kept(store, 0)
    expected = oracle.Values(models.tiny("llama", "token"))([PROMPTS[0]])[0]
    assert record.value == pytest.approx(expected, abs=1e-5)
    assert not record.tokens
    assert scorer.stats.passthroughs == 1


def test_a_record_is_final_where_its_token_is_surely_chosen(scorer):
    live = named([CONFIG] * 4)
    # As on V1: after a step, before any, at the end of its value; and as on V2.
    live[0].row.seen = len(PROMPTS[0]) - 1
    live[2].row.seen, live[2].row.abstains = len(PROMPTS[2]) - 1, True
    live[2].row.request = replace(live[2].row.request, end_token=models.EOS)
    live[3].row.is_prefilled = True
    store, _ = stepped(scorer, live)
    records = decoded(store.take(NAMES))
    assert [records[name][0].final for name in NAMES] == [True, False, False, True]


def test_the_rows_of_v2_have_their_prompts_behind_them():
    slots = SlotRows(lambda params: Request(CONFIG, (models.EOS,)), states=None)
    slots.add(3, SimpleNamespace())
    assert [row.samples_for_sure for row in slots.live()] == [True]


def test_who_did_not_ask_costs_nothing(scorer):
    scorer.stats.reset()
    store, _ = stepped(scorer, named([UNGUIDED] * 4, silent=range(4)))
    assert len(store) == scorer.stats.rows_scored == 0


@pytest.mark.parametrize("fault", ["raises", "nan baseline"])
def test_a_scorer_that_fails_leaves_no_value_and_is_counted_once(scorer, fault):
    scorer.stats.reset()
    store, logits = stepped(Failing(scorer, fault), named([CONFIG] * 4))
    # The faulty row is the one of nine tokens.
    (record,) = kept(store, 1)
    assert math.isnan(record.value)
    assert record.advantage(int(logits[1].argmax())) is None
    assert scorer.stats.passthroughs == (4 if fault == "raises" else 1)


def test_a_response_that_is_over_is_not_read(scorer):
    live = named([UNGUIDED] * 4, silent=[1, 2, 3])
    live[0].row.history.append(models.EOS)
    scorer.stats.reset()
    store, _ = stepped(scorer, live)
    (record,) = decoded(store.take(NAMES))[NAMES[0]]
    assert math.isnan(record.value)
    assert scorer.stats.rows_scored == 0
