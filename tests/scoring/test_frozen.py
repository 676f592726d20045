"""A frozen scorer's weights are looked at no more: for servers, which alone hold theirs."""

import copy

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.forward.weights import WeightWatch
from tests import models


def value(scorer):
    return scorer.score([[3, 5, 7]], torch.tensor([[8, 9]])).values[0, 0].item()


def from_paths(**options):
    return load_scorer(models.saved("llama", "token"), kind="verl-critic", **options)


def twice(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)


@pytest.fixture
def looks(monkeypatch):
    """The watches of weights that somebody asked."""
    found = []
    look = WeightWatch.changed

    def counted(watch):
        if watch._held:
            found.append(watch)
        return look(watch)

    monkeypatch.setattr(WeightWatch, "changed", counted)
    return found


def test_a_frozen_scorer_looks_at_no_weights_and_answers_as_before(looks):
    scorer = from_paths()
    before = value(scorer)
    assert looks
    scorer.freeze()
    looks.clear()
    assert value(scorer) == before
    assert not looks


def test_its_reward_and_its_reference_are_frozen_too(looks):
    reward = load_scorer(models.saved("llama", "sequence"), kind="reward-model")
    scorer = from_paths(reference=models.saved("llama", "lm"), reward=reward, terminal="reward")
    assert scorer.reward is reward
    scorer.freeze()
    looks.clear()
    value(scorer)
    value(reward)
    scorer.reference.log_probs([[3, 5]], torch.tensor([[8]]))
    pair = load_scorer(
        models.saved("llama", "lm"), kind="implicit", reference=models.saved("llama", "lm")
    )
    pair.freeze()
    looks.clear()
    value(pair)
    assert not looks


def test_what_was_written_before_is_followed():
    scorer, other = from_paths(), from_paths()
    value(scorer)
    for each in (scorer, other):
        twice(each.model.model)
    scorer.freeze()
    assert value(scorer) == pytest.approx(value(other), abs=1e-6)


def test_a_copy_is_followed():
    scorer = from_paths()
    scorer.freeze()
    copied, other = copy.deepcopy(scorer), from_paths()
    before = value(copied)
    for each in (copied, other):
        twice(each.model.model)
    assert value(copied) == pytest.approx(value(other), abs=1e-6) != pytest.approx(before)


@pytest.mark.parametrize("shared", ["trunk", "reference", "reward"])
def test_a_model_in_memory_is_followed_and_nothing_is_frozen(shared, looks):
    if shared == "trunk":
        scorer = load_scorer(models.tiny("llama", "token"), kind="verl-critic")
    elif shared == "reference":
        scorer = from_paths(reference=models.tiny("llama", "lm"))
    else:
        reward = load_scorer(models.tiny("llama", "sequence"), kind="reward-model")
        scorer = from_paths(reward=reward, terminal="reward")
    with pytest.raises(ValueError, match="shares weights with a model in memory"):
        scorer.freeze()
    looks.clear()
    value(scorer)
    assert looks
