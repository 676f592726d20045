"""Batches of prompts decoded by one method, with what they cost and how far they diverge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.demo.divergences import best_of_kl, greedy_kl, sampled_kl
from guided_decode.lab.demo.methods import By, Method
from guided_decode.lab.demo.task import SUMS, Task
from guided_decode.scorer import Scorer
from guided_decode.scoring.critic import CriticScorer

Loop = Callable[[Scorer, GuidanceConfig], Any]


@dataclass(frozen=True, slots=True)
class Models:
    """A causal LM of transformers and the value model that guides it, in float32 on the CPU.

    loop: what `generate` takes as `custom_generate`, from a scorer and a config.
    task: what they are asked. trunk: a head on the policy's own hidden states, with the loop that
    runs the policy for it.
    """

    policy: Any
    tokenizer: PreTrainedTokenizerBase
    critic: CriticScorer
    loop: Loop
    task: Task = SUMS
    trunk: tuple[CriticScorer, Loop] | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to a batch of messages.

    responses: token ids, EOS included. kl: nats, summed over a response, float32 [rows].
    policy_tokens, scorer_tokens: tokens that went through the models; prompts counted once.
    """

    responses: list[list[int]]
    texts: list[str]
    kl: Tensor
    policy_tokens: int
    scorer_tokens: int


def answer(models: Models, messages: Sequence[str], method: Method) -> Answers:
    """Decodes the messages by a method; torch's global generator draws the samples."""
    prompts = prompt_ids(models, messages)
    guide = _guide(models, method)[0]
    guide.stats.reset()
    output = _generate(models, prompts, method)
    responses = _responses(models, output.sequences, max(map(len, prompts)))
    forwarded, scored = policy_tokens(prompts, responses), guide.stats.tokens
    if method.by == "trunk":  # whose forwards are the policy's
        forwarded, scored = scored, 0
    return Answers(
        responses=responses,
        texts=texts(models, responses),
        kl=_kl(output, responses, method),
        policy_tokens=forwarded,
        scorer_tokens=scored,
    )


def draw(models: Models, messages: Sequence[str], n: int) -> list[list[list[int]]]:
    """n plain samples of each message, token ids."""
    prompts = prompt_ids(models, messages)
    sequences = _generate(models, prompts, Method("", "", best_of=n)).sequences
    rows = _responses(models, sequences, max(map(len, prompts)))
    return [rows[i * n : (i + 1) * n] for i in range(len(prompts))]


def pick(
    models: Models,
    messages: Sequence[str],
    samples: Sequence[Sequence[list[int]]],
    by: By = "critic",
) -> Answers:
    """For each message the best sample: by the task's own judge, or by what the critic says.

    The critic's word is its value at the last token before EOS. Where a response must end, those
    that do not are picked last: PPO's reward punished them, whatever V says.
    """
    prompts = prompt_ids(models, messages)
    models.critic.stats.reset()
    worth = (_values if by == "critic" else _judged)(models, messages, prompts, samples)
    best = worth.argmax(-1).tolist()
    chosen = [own[i] for own, i in zip(samples, best, strict=True)]
    return Answers(
        responses=chosen,
        texts=texts(models, chosen),
        kl=torch.full((len(chosen),), best_of_kl(len(samples[0])), dtype=torch.float32),
        policy_tokens=sum(
            policy_tokens([prompt], own) for prompt, own in zip(prompts, samples, strict=True)
        ),
        scorer_tokens=models.critic.stats.tokens,
    )


def _values(
    models: Models,
    messages: Sequence[str],
    prompts: Sequence[list[int]],
    samples: Sequence[Sequence[list[int]]],
) -> Tensor:
    eos = models.tokenizer.eos_token_id
    rows = [
        prompt + [token for token in response if token != eos]
        for prompt, own in zip(prompts, samples, strict=True)
        for response in own
    ]
    ended = [response[-1] == eos for own in samples for response in own]
    values = models.critic.score(rows, torch.empty(len(rows), 0, dtype=torch.int64)).baseline
    if models.task.must_end:
        values = values.masked_fill(~torch.tensor(ended), -torch.inf)
    return values.view(len(samples), -1)


def _judged(
    models: Models,
    messages: Sequence[str],
    prompts: Sequence[list[int]],
    samples: Sequence[Sequence[list[int]]],
) -> Tensor:
    return torch.tensor(
        [
            [models.task.judge(message, text) for text in texts(models, own)]
            for message, own in zip(messages, samples, strict=True)
        ]
    )


def prompt_ids(models: Models, messages: Sequence[str]) -> list[list[int]]:
    """Token ids of the chats, without the tokenizer's own BOS, as PPO saw them."""
    chats = [models.task.render(message) for message in messages]
    ids: list[list[int]] = models.tokenizer(chats, add_special_tokens=False).input_ids
    return ids


def texts(models: Models, responses: Sequence[list[int]]) -> list[str]:
    """The responses as text, without EOS."""
    return models.tokenizer.batch_decode(list(responses), skip_special_tokens=True)


def policy_tokens(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> int:
    """Tokens that the policy forwards: prompts, and all but the last token of each response."""
    return sum(map(len, prompts)) + sum(len(response) - 1 for response in responses)


def _generate(models: Models, prompts: Sequence[list[int]], method: Method) -> Any:
    inputs = models.tokenizer.pad(
        {"input_ids": list(prompts)}, padding_side="left", return_tensors="pt"
    )
    guided = {}
    if method.config is not None:
        scorer, loop = _guide(models, method)
        guided["custom_generate"] = loop(scorer, method.config)
    measured = method.best_of == 1
    config = GenerationConfig(
        do_sample=method.sample,
        top_k=0,
        max_new_tokens=models.task.max_new_tokens,
        num_return_sequences=method.best_of,
        eos_token_id=models.tokenizer.eos_token_id,
        pad_token_id=models.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=measured,
        output_scores=measured,
    )
    return models.policy.generate(**inputs, generation_config=config, **guided)


def _guide(models: Models, method: Method) -> tuple[CriticScorer, Loop]:
    if method.by != "trunk":
        return models.critic, models.loop
    if models.trunk is None:
        raise ValueError(f"{method.name}: there is no head on the policy's hidden states")
    return models.trunk


def _responses(models: Models, sequences: Tensor, width: int) -> list[list[int]]:
    eos = models.tokenizer.eos_token_id
    rows = sequences[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def _kl(output: Any, responses: Sequence[list[int]], method: Method) -> Tensor:
    """KL from the policy, step by step, summed over each response."""
    total = torch.zeros(len(responses), dtype=torch.float32)
    lengths = torch.tensor([len(response) for response in responses])
    for step, (plain, guided) in enumerate(zip(output.logits, output.scores, strict=True)):
        chosen = guided.argmax(-1)
        own = sampled_kl(guided, plain) if method.sample else greedy_kl(chosen, plain)
        total += own * (step < lengths)
    return total
