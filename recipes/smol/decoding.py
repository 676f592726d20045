"""Answers of one policy to a list of messages, at temperature 1, with what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from guided_decode import GuidanceConfig, smol
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.lab.demo.divergences import sampled_kl
from recipes.smol.family import Family
from recipes.smol.judge import prompt_ids
from recipes.smol.settings import MAX_NEW_TOKENS


@dataclass
class Answers:
    """responses: token ids, EOS included. rewards: of the task's judge. kl: nats, over all."""

    responses: list[list[int]]
    rewards: list[float]
    kl: float
    policy_tokens: int
    scorer_tokens: int

    @property
    def kl_per_token(self) -> float:
        return self.kl / sum(map(len, self.responses))


@torch.no_grad()
def answer(
    family: Family,
    policy: str,
    task: str,
    messages: Sequence[str],
    *,
    guided: GuidanceConfig | None = None,
    seed: int,
    batch_size: int = 40,
) -> Answers:
    """One answer a message, sampled; guided by the family's critic where a config is given."""
    torch.manual_seed(seed)
    # What an earlier call left there would make this one cheaper than it is.
    family.critic.cache.clear()
    family.critic.stats.reset()
    found = Answers([], [], 0.0, 0, 0)
    for start in range(0, len(messages), batch_size):
        prompts = [prompt_ids(family.tokenizer, m) for m in messages[start : start + batch_size]]
        output = _generate(family, policy, prompts, guided)
        responses = _responses(family, output.sequences, max(map(len, prompts)))
        found.kl += _kl(output, responses)
        found.policy_tokens += sum(map(len, prompts)) + sum(len(row) - 1 for row in responses)
        found.responses += responses
    found.scorer_tokens = family.critic.stats.tokens
    found.rewards = rewards(family, task, messages, found.responses)
    return found


def rewards(
    family: Family, task: str, messages: Sequence[str], responses: Sequence[list[int]]
) -> list[float]:
    """What the task's judge says of each response."""
    texts = family.tokenizer.batch_decode(list(responses), skip_special_tokens=True)
    judge = smol.find_task(task).reward
    return [judge(message, text) for message, text in zip(messages, texts, strict=True)]


def values(
    family: Family, messages: Sequence[str], responses: Sequence[list[int]], fraction: float
) -> Tensor:
    """V when `fraction` of each response is there, EOS never, float32 [rows]."""
    prefixes = [
        prompt_ids(family.tokenizer, message) + row[: min(len(row) - 1, int(len(row) * fraction))]
        for message, row in zip(messages, responses, strict=True)
    ]
    nothing = torch.empty(len(prefixes), 0, dtype=torch.int64)
    return family.critic.score(prefixes, nothing).baseline


def _generate(
    family: Family, policy: str, prompts: list[list[int]], guided: GuidanceConfig | None
) -> Any:
    inputs = family.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=family.tokenizer.eos_token_id,
        pad_token_id=family.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    loop = {} if guided is None else {"custom_generate": GuidedDecoding(family.critic, guided)}
    with family.policy(policy) as model:
        return model.generate(**inputs, generation_config=config, **loop)


def _responses(family: Family, sequences: Tensor, width: int) -> list[list[int]]:
    eos = family.tokenizer.eos_token_id
    rows = sequences[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def _kl(output: Any, responses: Sequence[list[int]]) -> float:
    """KL(guided ‖ policy), exact step by step, summed over all responses."""
    lengths = torch.tensor([len(row) for row in responses])
    steps = enumerate(zip(output.scores, output.logits, strict=True))
    return sum(float((sampled_kl(q, p) * (i < lengths)).sum()) for i, (q, p) in steps)
