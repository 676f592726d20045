"""A frozen scorer's weights are looked at no more: for servers, which alone hold theirs."""

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.forward.weights import WeightWatch
from tests import models


def value(scorer):
    return scorer.score([[3, 5, 7]], torch.tensor([[8, 9]])).values[0, 0].item()


@pytest.fixture
def looks(monkeypatch):
    """Each time that somebody looks."""
    found = []
    look = WeightWatch.changed
    monkeypatch.setattr(WeightWatch, "changed", lambda watch: (found.append(watch), look(watch))[1])
    return found


def test_a_frozen_scorer_looks_at_no_trunk_and_answers_as_before(looks):
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")
    before = value(scorer)
    of_trunk = len([watch for watch in looks if watch._held])
    assert of_trunk
    looks.clear()
    scorer.freeze()
    assert value(scorer) == before
    assert not [watch for watch in looks if watch._held]


def test_its_reward_and_its_reference_are_frozen_too(looks):
    lm = models.saved("llama", "lm")
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic", reference=lm)
    scorer.freeze()
    scorer.reference.log_probs([[3, 5]], torch.tensor([[8]]))
    pair = load_scorer(lm, kind="implicit", reference=models.saved("llama", "lm"))
    pair.freeze()
    value(pair)
    assert not [watch for watch in looks if watch._held]


def test_a_model_in_memory_is_followed_and_cannot_be_frozen():
    scorer = load_scorer(models.tiny("llama", "token"), kind="verl-critic")
    with pytest.raises(ValueError, match="shares its weights with a model in memory"):
        scorer.freeze()
