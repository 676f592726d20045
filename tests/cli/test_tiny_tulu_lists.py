"""The models of tiny-tulu's lists by their names: `score` and `search` say what they say."""

import functools
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner

from guided_decode.cli.app import app
from guided_decode.tiny_tulu import lists, render
from tests.cli.search_runs import read, search, write

NAMES = {f"tiny-tulu-{name}": name for name in ("reward", "dpo", "kto") if name in lists.MODELS}


@functools.cache
def model(name):
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    return kind.from_pretrained(lists.model_path(name)).eval()


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(lists.model_path("sft"))


def expected(name, prompt, response):
    """A reward model's output at EOS, or log π_tuned − log π_SFT of the response, by the stock
    forward."""
    start, rest = (
        tokenizer().encode(text, add_special_tokens=False)
        for text in (render(prompt), f"{response}</s>")
    )
    ids = torch.tensor([start + rest])
    if name == "reward":
        return model(name)(input_ids=ids).logits[0, 0].item()
    own, reference = (
        model(each)(input_ids=ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
        for each in (name, "sft")
    )
    return (own - reference).gather(-1, ids[0, len(start) :, None]).sum().item()


@pytest.mark.parametrize("scorer", NAMES)
def test_score_ranks_pairs_by_what_the_model_says(scorer, tmp_path):
    pairs = lists.held_out_pairs()[:12]
    chats = [
        {"prompt": pair.prompt, "response": text}
        for pair in pairs for text in (pair.chosen, pair.rejected)
    ]  # fmt: skip
    source, output = write(tmp_path / "in.jsonl", chats), tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["score", str(source), str(output), "--scorer", scorer])
    assert result.exit_code == 0, result.output
    scores = [line["score"] for line in read(output)]
    for chat, score in zip(chats, scores, strict=True):
        value = expected(NAMES[scorer], chat["prompt"], chat["response"])
        assert score == pytest.approx(value, abs=2e-3)
    assert sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) >= 8


@pytest.mark.parametrize("scorer", NAMES)
def test_search_keeps_the_sample_that_the_model_likes_best(scorer, tmp_path):
    prompts = lists.validation_prompts(6)
    source = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    lines = search("--method", "best-of-n", "--n", 6, "--temperature", 1, "--max-new-tokens", 30,
                   "--policy", "tiny-tulu-lists-sft", "--scorer", scorer, source)  # fmt: skip
    drawn, kept = [], []
    for prompt, line in zip(prompts, lines, strict=True):
        candidates = line["candidates"]
        assert all(each["finished"] for each in candidates)
        for each in candidates:
            value = expected(NAMES[scorer], prompt, each["response"].removesuffix("</s>"))
            assert each["score"] == pytest.approx(value, abs=2e-3), each
        best = max(range(len(candidates)), key=lambda i: candidates[i]["score"])
        assert line["chosen"] == best
        rewards = [lists.reward(prompt, each["response"]) for each in candidates]
        drawn.append(sum(rewards) / len(rewards))
        kept.append(rewards[best])
    assert sum(kept) / len(kept) > sum(drawn) / len(drawn) + 0.2


def test_generate_takes_the_reward_model_for_the_policy_of_the_lists():
    prompt = "Sort and count 82051."
    words = ["--policy", "tiny-tulu-lists-sft", "--prompt", prompt, "--compare", "--json"]
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["plain"]["text"] == lists.answer(prompt, greet=True, count=True)
    assert line["guided"]["text"] == lists.best_answer(prompt)
