"""Preference training of the lists by TRL itself, on few pairs."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from guided_decode.tiny_tulu import lists, render
from recipes.tiny_tulu_lists.judge import RewardJudge
from recipes.tiny_tulu_lists.samples import draw, exact, extremes

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

from recipes.tiny_tulu_lists.preferences import (
    KTO_ITERATIONS,
    iterate_kto,
    train_dpo,
    train_kto,
    train_reward,
)

pytestmark = pytest.mark.slow
N = 256


@pytest.fixture
def gradients(no_gradients):
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def sft() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(lists.model_path("sft"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(lists.model_path("sft"))


@pytest.fixture(scope="module")
def pairs(sft, tokenizer) -> list[lists.Pair]:
    prompts = lists.training_prompts(N, seed=7)
    return extremes(prompts, draw(sft, tokenizer, prompts, 4, seed=7), exact)


def log_prob(model, tokenizer, prompt: str, response: str) -> float:
    """Of a whole answer with its end, by the stock forward."""
    start = tokenizer(render(prompt), add_special_tokens=False).input_ids
    answer = tokenizer(response + tokenizer.eos_token, add_special_tokens=False).input_ids
    ids = torch.tensor([start + answer])
    with torch.no_grad():
        logits = model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(answer)[:, None]).sum().item()


def test_samples_are_drawn_by_the_policy_and_repeat(sft, tokenizer):
    prompts = lists.training_prompts(8, seed=8)
    first = draw(sft, tokenizer, prompts, 3, seed=1)
    assert first == draw(sft, tokenizer, prompts, 3, seed=1)
    assert first != draw(sft, tokenizer, prompts, 3, seed=2)
    assert [len(own) for own in first] == [3] * 8


@pytest.mark.usefixtures("gradients")
def test_the_reward_model_learns_to_order_pairs(sft, tokenizer, pairs, tmp_path):
    steps = []
    model = train_reward(sft, tokenizer, pairs * 4, 0, tmp_path, steps.append)
    assert isinstance(model, LlamaForSequenceClassification)
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0]
    held_out = lists.held_out_pairs()[:200]
    prompts = [pair.prompt for pair in held_out]
    judge = RewardJudge(model, tokenizer)
    chosen = judge(prompts, [pair.chosen for pair in held_out])
    rejected = judge(prompts, [pair.rejected for pair in held_out])
    assert sum(a > b for a, b in zip(chosen, rejected, strict=True)) > 140


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("train", [train_dpo, train_kto], ids=["dpo", "kto"])
def test_tuning_makes_what_was_chosen_likelier_than_what_was_rejected(
    train, sft, tokenizer, pairs, tmp_path
):
    before = {name: each.clone() for name, each in sft.state_dict().items()}
    tuned = train(sft, tokenizer, pairs * 4, 0, tmp_path, lambda _: None)
    # The reference stays what it was, and the tuned one is a plain Llama.
    assert all(torch.equal(each, before[name]) for name, each in sft.state_dict().items())
    assert tuned.forward.__func__ is LlamaForCausalLM.forward

    def ratio(prompt: str, response: str) -> float:
        own, other = (log_prob(each, tokenizer, prompt, response) for each in (tuned, sft))
        return own - other

    held_out = lists.held_out_pairs()[:60]
    right = [ratio(p.prompt, p.chosen) > ratio(p.prompt, p.rejected) for p in held_out]
    assert sum(right) > 42


@pytest.mark.usefixtures("gradients")
def test_each_kto_iteration_takes_samples_of_the_last_policy_as_the_judge_ranks_them(
    sft, tokenizer, tmp_path
):
    judged, steps = [], []

    def judge(prompts, responses):
        judged.append((prompts, responses))
        return exact(prompts, responses)

    tuned = iterate_kto(sft, judge, tokenizer, 0, tmp_path, steps.append, messages=64)
    assert tuned.forward.__func__ is LlamaForCausalLM.forward
    pairs = [step["pairs"] for step in steps if "pairs" in step]
    assert len(pairs) == len(judged) == KTO_ITERATIONS
    for i, (prompts, responses) in enumerate(judged):
        assert prompts[::4] == lists.training_prompts(64, seed=2 + i)
        assert len(responses) == 4 * 64
    first = draw(sft, tokenizer, judged[0][0][::4], 4, seed=10_000)
    assert judged[0][1] == [text for own in first for text in own]
    # The second iteration's samples are not the policy's that the first one began with.
    again = draw(sft, tokenizer, judged[1][0][::4], 4, seed=20_000)
    assert judged[1][1] != [text for own in again for text in own]
