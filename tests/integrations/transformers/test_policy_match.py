"""A policy and a scorer that cannot have one tokenizer are refused, by what `generate` shows."""

import copy
import logging

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import (
    GuidedDecoding,
    ValueGuidedLogitsProcessor,
    policy_match,
)
from tests import models, oracle

CONFIG = GuidanceConfig(beta=1.5, top_k=6)
PROMPT = torch.tensor([[5, 6, 7, 8]])
# The ids of a tokenizer with 700 tokens and its special ones at the end, as Llama 3 has them.
LARGE = {"vocab_size": 700, "bos_token_id": 690, "eos_token_id": 695, "pad_token_id": 696}


@pytest.fixture(autouse=True)
def nothing_warned():
    policy_match._warn_once.cache_clear()


def scorer(**config):
    return load_scorer(models.tiny("llama", "token", **config), kind="verl-critic")


def policy(**config):
    return models.tiny("llama", "lm", seed=1, **config)


def guide(policy, scorer, config=CONFIG, **options):
    return policy.generate(
        PROMPT,
        custom_generate=GuidedDecoding(scorer, config),
        max_new_tokens=6,
        do_sample=False,
        **options,
    )


def test_a_scorer_of_another_tokenizer_is_refused_before_anything_is_scored():
    large = scorer(**LARGE)
    large.stats.reset()
    message = (
        "the policy has 101 token ids and the scorer 700, and EOS is 2 for the policy and 695 for "
        "the scorer and BOS is 1 for the policy and 690 for the scorer: they have different"
    )
    with pytest.raises(ValueError, match=message):
        guide(policy(), large)
    with pytest.raises(ValueError, match="the policy has 700 token ids and the scorer 101"):
        guide(policy(**LARGE), scorer())
    assert large.stats.forwards == 0


def test_the_bare_processor_refuses_by_the_logits_and_the_ends():
    processor = ValueGuidedLogitsProcessor(scorer(**LARGE), CONFIG, eos_token_id=2)
    with pytest.raises(
        ValueError, match="the policy has 101 token ids and the scorer 700, and EOS"
    ):
        policy().generate(PROMPT, logits_processor=[processor], max_new_tokens=1)


@pytest.mark.parametrize("extra", [27, 411])
def test_logits_that_are_padded_further_than_the_scorers_go_on_working(extra, caplog):
    padded = policy(vocab_size=models.VOCAB + extra)
    own = copy.deepcopy(padded)
    with torch.no_grad():
        own.lm_head.weight[models.VOCAB :] = 0.0  # of no token
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    out = guide(own, scorer())[0, 4:].tolist()
    expected = brute.greedy(oracle.LogProbs(own), PROMPT[0].tolist(), CONFIG, [models.EOS], 6)
    oracle.assert_greedy_equal([out], [expected])
    assert caplog.text == ""


def test_a_size_alone_warns_once(caplog):
    for _ in range(2):
        guide(policy(), scorer(vocab_size=700))
    assert caplog.text.count("the policy has 101 token ids and the scorer 700") == 1
    assert "load_scorer(..., policy_tokenizer=...)" in caplog.text


def test_a_likeliest_token_of_the_policys_alone_is_refused_in_words():
    wide = policy(vocab_size=models.VOCAB + 27)
    outside = "the likeliest token is outside the scorer's vocabulary of 101"
    with pytest.raises(ValueError, match=outside):
        guide(wide, scorer(), GuidanceConfig(top_k=models.VOCAB))
    tuned, reference = (models.saved("mistral", "lm", seed=seed) for seed in (6, 5))
    implicit = load_scorer(tuned, kind="implicit", reference=reference)
    with pytest.raises(ValueError, match=outside):
        guide(wide, implicit, GuidanceConfig(top_k=None))


def test_another_bos_alone_warns_once(caplog):
    for _ in range(2):
        guide(policy(), scorer(bos_token_id=9))
    assert caplog.text.count("BOS is 1 for the policy and 9 for the scorer") == 1


def test_one_end_in_common_is_enough(caplog):
    guide(policy(), scorer(eos_token_id=60), eos_token_id=[30, 60])
    assert caplog.text == ""


def test_where_nothing_but_sizes_can_be_compared_it_says_so_once(caplog):
    unknown = scorer(eos_token_id=None, bos_token_id=None)
    for _ in range(2):
        guide(policy(), unknown)
    assert caplog.text.count("nothing tells whether their tokenizers are the same") == 1


def test_models_that_agree_say_nothing(caplog):
    caplog.set_level(logging.WARNING, logger="guided_decode")
    guide(policy(), scorer())
    assert caplog.text == ""
