"""Greedy guided generation is the brute-force loop, token for token, whatever the cache holds."""

import random

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.guidance.step import guide_rows
from tests import models, oracle
from tests.integrations.transformers.test_generate import generate

LENGTHS = [3, 17, 40, 64, 90, 128, 171, 200]
NEW = 64
ENDS = [models.EOS]
CONFIG = GuidanceConfig(beta=1.0, top_k=6)
PROMPTS = models.prompts(LENGTHS, seed=21)
# The longest row, its candidates, and next to nothing: every step evicts, and scores in parts.
TIGHT = max(LENGTHS) + NEW + CONFIG.top_k + 2


@pytest.fixture(scope="module")
def policy():
    return models.tiny("llama", "lm", seed=1)


@pytest.fixture(scope="module")
def brute_force(policy):
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    lm = oracle.LogProbs(policy)
    return [brute.greedy(lm, prompt, CONFIG, ENDS, NEW) for prompt in PROMPTS]


def responses(out, width):
    for sequence in out.sequences[:, width:].tolist():
        stop = next((n + 1 for n, token in enumerate(sequence) if token in ENDS), len(sequence))
        yield sequence[:stop]


@pytest.mark.parametrize("cache_tokens", [65536, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("route", ["custom_generate", "logits_processor"])
def test_generate(policy, brute_force, route, cache_tokens):
    scorer = load_scorer(
        models.saved("llama", "token"), kind="verl-critic", cache_tokens=cache_tokens
    )
    out = generate(policy, PROMPTS, scorer, CONFIG, route, max_new_tokens=NEW, eos_token_id=ENDS)
    oracle.assert_greedy_equal(list(responses(out, max(LENGTHS))), brute_force)
    assert (scorer.stats.evictions > 0) == (cache_tokens == TIGHT)
    scorer.cache.check()
    assert scorer.cache.pinned == 0


def test_the_brute_force_loop_takes_other_tokens_than_the_policy_alone(policy, brute_force):
    ids = torch.tensor([PROMPTS[0]])
    plain = policy.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=ENDS)
    assert plain[0, len(PROMPTS[0]) :].tolist() != brute_force[0][0]
    assert max(len(tokens) for tokens, _ in brute_force) == NEW


@pytest.mark.parametrize("cache_tokens", [65536, TIGHT], ids=["roomy", "tight"])
def test_rows_that_are_shuffled_between_calls(policy, brute_force, cache_tokens):
    scorer = load_scorer(
        models.saved("llama", "token"), kind="verl-critic", cache_tokens=cache_tokens
    )
    lm, order = oracle.LogProbs(policy), random.Random(0)
    sequences = [list(prompt) for prompt in PROMPTS]
    live = list(range(len(PROMPTS)))
    for _ in range(NEW):
        order.shuffle(live)
        logits = torch.stack([lm.logits(sequences[row]) for row in live])
        prefixes = [sequences[row] for row in live]
        guided = guide_rows(scorer, logits, prefixes, CONFIG, terminals=ENDS)
        for row, token in zip(live, guided.argmax(-1).tolist(), strict=True):
            sequences[row].append(token)
        live = [row for row in live if sequences[row][-1] not in ENDS]
    generated = [
        sequence[len(prompt) :] for sequence, prompt in zip(sequences, PROMPTS, strict=True)
    ]
    oracle.assert_greedy_equal(generated, brute_force)
    scorer.cache.check()


@pytest.mark.parametrize("arch", ["mistral-sliding", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, GuidanceConfig(rule="prune", margin=0.5, top_k=6, top_p=0.9)],
    ids=["reweight", "prune"],
)
def test_other_architectures_on_both_sides(arch, config):
    prompts = models.prompts([3, 30, 75], seed=22)
    policy = models.tiny(arch, "lm", seed=1)
    brute = oracle.Oracle(oracle.Values(models.tiny(arch, "token")))
    lm = oracle.LogProbs(policy)
    expected = [brute.greedy(lm, prompt, config, ENDS, 24) for prompt in prompts]
    scorer = load_scorer(models.saved(arch, "token"), kind="verl-critic", cache_tokens=110)
    out = generate(policy, prompts, scorer, config, max_new_tokens=24, eos_token_id=ENDS)
    oracle.assert_greedy_equal(list(responses(out, 75)), expected)
