"""Samples of a policy, as the pairs and the verdicts that preference training takes."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_decode.tiny_tulu import render
from guided_decode.tiny_tulu.lists import Pair, reward
from recipes.tiny_tulu.decoding import decode

# Points of an answer to a message.
Judge = Callable[[Sequence[str], Sequence[str]], list[float]]
BATCH = 500


def exact(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The task's own reward."""
    return [reward(p, r) for p, r in zip(prompts, responses, strict=True)]


def draw(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    seed: int,
) -> list[list[str]]:
    """n samples of each message at temperature 1, as text."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    texts: list[str] = []
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        texts += decode(policy, tokenizer, batch, sample=True, seed=seed + begin).texts
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def extremes(prompts: Sequence[str], samples: Sequence[Sequence[str]], judge: Judge) -> list[Pair]:
    """Of each message's samples the best and the worst; messages whose samples tie are left out."""
    rows = [(prompt, text) for prompt, own in zip(prompts, samples, strict=True) for text in own]
    points = judge([prompt for prompt, _ in rows], [text for _, text in rows])
    pairs, done = [], 0
    for prompt, own in zip(prompts, samples, strict=True):
        ranked = sorted(zip(points[done : done + len(own)], own, strict=True))
        done += len(own)
        (least, worst), (most, best) = ranked[0], ranked[-1]
        # Equal answers of one batch may differ in the last bit of a model's score.
        if most > least and best != worst:
            pairs.append(Pair(prompt, best, worst, round(most - least, 4)))
    return pairs


def reward_rows(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], seed: int
) -> list[dict[str, list[int]]]:
    """Pairs as TRL's reward trainer takes them tokenised, each twice: with whole answers, and with
    answers cut at places of their own, so that what it says before an end is on the same scale."""
    rng, eos = random.Random(seed), [tokenizer.eos_token_id]
    rows = []
    for pair in pairs:
        start, chosen, rejected = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (render(pair.prompt), pair.chosen, pair.rejected)
        )
        whole = chosen + eos, rejected + eos
        cut = tuple(answer[: rng.randint(1, len(answer))] for answer in whole)
        rows += [{"chosen_ids": start + a, "rejected_ids": start + b} for a, b in (whole, cut)]
    rng.shuffle(rows)
    return rows


def pair_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Pairs as TRL's DPO trainer reads conversations."""
    return [
        {"prompt": _turn("user", pair.prompt), "chosen": _turn("assistant", pair.chosen),
         "rejected": _turn("assistant", pair.rejected)}
        for pair in pairs
    ]  # fmt: skip


def verdict_rows(pairs: Sequence[Pair], seed: int) -> list[dict[str, Any]]:
    """Both answers of each pair by themselves, as TRL's KTO trainer reads them, in random order:
    it takes the examples of a batch as they come, for the KL term of its neighbours."""
    rows = [
        {
            "prompt": _turn("user", pair.prompt),
            "completion": _turn("assistant", text),
            "label": good,
        }
        for pair in pairs
        for text, good in ((pair.chosen, True), (pair.rejected, False))
    ]
    random.Random(seed).shuffle(rows)
    return rows


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
