"""One setting on a batch of prompts: which answers are right, and what they cost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.search_methods.settings import Setting
from guided_decode import GuidanceConfig, load_scorer, tiny_tulu
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.search import ANSWERS, ScorerJudge, find_method, load_generator, run_all
from guided_decode.search.budget import TokenTree
from guided_decode.search.seeds import derive

MAX_TOKENS = 80
# Of each model: a batch of 200 prompts with what eight samples and their branches need.
CACHE_TOKENS = 80_000


@dataclass(frozen=True)
class Measured:
    """right: of each prompt. Tokens are of the whole batch, a prompt's beginning its own.

    drawn: tokens that the policy reads and draws, each draw of equal tokens counted: what an
    engine that shares prompts alone decodes. forwarded: what went through the policy here, by its
    counter: branches share what they have in common. scorer: what went through the critic, by its
    counter. seconds: on the clock.
    """

    right: list[int]
    drawn: int
    forwarded: int
    scorer: int
    seconds: float


class Family:
    """A policy of tiny-tulu and its critic, in float32."""

    def __init__(self, policy: str) -> None:
        self.path = tiny_tulu.model_path(policy)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.path)
        self.critic = load_scorer(
            "tiny-tulu-value", policy_tokenizer=self.tokenizer, cache_tokens=CACHE_TOKENS
        )
        self.generator = load_generator(f"tiny-tulu-{policy}", cache_tokens=CACHE_TOKENS)
        self.judge = ScorerJudge(self.critic, terminals=self.generator.eos_token_ids)

    @cached_property
    def model(self) -> Any:
        """The policy for `generate`."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def measure(self, setting: Setting, messages: Sequence[str], first: int, seed: int) -> Measured:
        """Answers to messages; first: the number of the first one, which seeds the draws."""
        for cache in (self.generator.policy.cache, self.critic.cache):
            cache.clear()
        for stats in (self.generator.stats, self.critic.stats):
            stats.reset()
        begun = time.perf_counter()
        prompts = [self.generator.encode(tiny_tulu.render(each)) for each in messages]
        alike = sum(map(len, prompts)) - _distinct(prompts)
        if setting.runs in ("generate", "guide"):
            responses = self._generated(setting, prompts, derive(seed, first) % 2**31)
            drawn = forwarded = sum(map(len, prompts)) + sum(map(len, responses))
            forwarded -= len(responses)  # the last token of a response is read by nobody
        else:
            responses, drawn = self._searched(setting, prompts, first, seed)
            forwarded = self.generator.stats.tokens + alike
        if self.generator.stats.evictions or self.critic.stats.evictions:
            raise RuntimeError("the caches were too small for the batch: what was evicted is "
                               "forwarded twice, and the counts would say so")  # fmt: skip
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        right = [int(tiny_tulu.is_correct(m, t)) for m, t in zip(messages, texts, strict=True)]
        scorer = self.critic.stats.tokens
        return Measured(right, drawn, forwarded, scorer + alike if scorer else 0,
                        round(time.perf_counter() - begun, 2))  # fmt: skip

    def _searched(
        self, setting: Setting, prompts: list[list[int]], first: int, seed: int
    ) -> tuple[list[list[int]], int]:
        method, given = find_method(setting.runs), dict(setting.given)
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        answer = self._answer if method.votes else None
        searches = [
            method.begin(
                prompt, seed=derive(seed, first + i), max_tokens=MAX_TOKENS, answer=answer, **given
            )
            for i, prompt in enumerate(prompts)
        ]
        results = run_all(searches, self.generator, self.judge)
        drawn = sum(map(len, prompts)) + sum(result.spent.generated for result in results)
        return [list(result.best.tokens) for result in results], drawn

    def _answer(self, tokens: tuple[int, ...]) -> Any:
        return ANSWERS["final"](self.generator.decode(tokens))

    def _generated(self, setting: Setting, prompts: list[list[int]], seed: int) -> list[list[int]]:
        given = dict(setting.given)
        sample = given.pop("sample", True)
        guided = {}
        if setting.runs == "guide":
            guided["custom_generate"] = GuidedDecoding(self.critic, GuidanceConfig(**given))
        inputs = self.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        eos = self.tokenizer.eos_token_id
        config = GenerationConfig(
            do_sample=sample, top_k=0, max_new_tokens=MAX_TOKENS, eos_token_id=eos,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(seed)
        output = self.model.generate(**inputs, generation_config=config, **guided)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def _distinct(rows: Sequence[Sequence[int]]) -> int:
    tree = TokenTree()
    for row in rows:
        tree.add(row)
    return len(tree)
