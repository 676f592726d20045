"""The released tiny-tulu models: how good the critic is, and what guidance by it buys.

beta, k and the rest were chosen on the validation prompts; here are the 1,000 held-out ones.
"""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import load_scorer, tiny_tulu
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.lab.demo import decoding
from guided_decode.lab.demo.chosen import REWEIGHT
from guided_decode.lab.demo.decoding import Models
from guided_decode.lab.demo.measure import Outcome
from guided_decode.lab.demo.methods import Method
from recipes.tiny_tulu.metrics import auc, paired_bootstrap

# The limit ends a hang, and a thousand prompts take what a machine takes.
pytestmark = pytest.mark.timeout(3600)

MESSAGES = tiny_tulu.held_out_prompts()
BATCH = 100


@functools.cache
def models(policy: str) -> Models:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path(policy))
    model = AutoModelForCausalLM.from_pretrained(
        tiny_tulu.model_path(policy), dtype=torch.float32
    ).eval()
    critic = load_scorer(tiny_tulu.model_path("value"), policy_tokenizer=tokenizer)
    return Models(model, tokenizer, critic, GuidedDecoding)


@functools.cache
def outcome(policy: str, sample: bool, guided: bool) -> Outcome:
    method = Method("", "", sample=sample, config=REWEIGHT if guided else None)
    result = Outcome(policy, method)
    torch.manual_seed(0)
    for begin in range(0, len(MESSAGES), BATCH):
        batch = MESSAGES[begin : begin + BATCH]
        result.add(batch, decoding.answer(models(policy), batch, method), 0.0)
    return result


def right(result: Outcome) -> torch.Tensor:
    return torch.tensor(result.right, dtype=torch.float32)


def test_the_held_out_prompts_are_a_thousand_and_apart_from_the_validation_prompts():
    assert len(set(MESSAGES)) == 1_000
    assert not set(MESSAGES) & set(tiny_tulu.validation_prompts())


def test_the_sft_policy_errs_and_guided_by_the_critic_it_hardly_does():
    plain, guided = outcome("sft", False, False), outcome("sft", False, True)
    assert 0.30 <= plain.score <= 0.75
    assert guided.score >= min(plain.score + 0.40, 0.95)


@pytest.mark.slow
def test_the_ppo_policy_gains_from_its_own_value_model():
    plain, guided = outcome("ppo", True, False), outcome("ppo", True, True)
    gain, low, high = paired_bootstrap(right(guided), right(plain))
    assert low > 0, f"gain {gain:.3f}, 95% interval {low:.3f} to {high:.3f}"


@pytest.mark.parametrize("policy", ["ppo"])
def test_the_critic_tells_right_from_wrong_when_a_response_is_half_finished(policy):
    sampled = outcome(policy, True, False)
    family = models(policy)
    prompts = decoding.prompt_ids(family, sampled.messages)
    halves = [
        prompt + response[: len(response) // 2]
        for prompt, response in zip(prompts, sampled.responses, strict=True)
    ]
    nothing = torch.empty(len(halves), 0, dtype=torch.int64)
    values = family.critic.score(halves, nothing).baseline
    assert auc(values, right(sampled)) >= 0.80


@pytest.mark.slow
def test_guidance_forwards_no_more_tokens_than_eight_samples_and_is_as_accurate():
    guided = outcome("sft", True, True)
    family, messages = models("sft"), MESSAGES[:200]
    family.critic.cache.clear()
    torch.manual_seed(0)
    best = Outcome("sft", Method("", "", best_of=8))
    best.add(messages, decoding.pick(family, messages, decoding.draw(family, messages, 8)), 0.0)
    assert guided.tokens_per_answer <= best.tokens_per_answer
    assert guided.score >= best.score - 0.02
