"""The reward of a rollout: each task's own judge, by the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode import smol


class Judge:
    """Rewards of responses to known prompts, by the task that each prompt is of.

    Args:
        tokenizer: the policy's.
        messages: the user messages with the name of the task of each.

    `tasks` and `rewards` are those of the last call, row by row.
    """

    def __init__(self, tokenizer: Any, messages: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._of = {
            tuple(prompt_ids(tokenizer, message)): (message, smol.find_task(task))
            for message, task in messages.items()
        }
        self.tasks: list[str] = []
        self.rewards = torch.empty(0)

    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        """float32 [rows]; both are token ids without padding."""
        texts = self._tokenizer.batch_decode(list(responses), skip_special_tokens=True)
        known = [self._of[tuple(prompt)] for prompt in prompts]
        self.tasks = [task.name for _, task in known]
        self.rewards = torch.tensor(
            [task.reward(message, text) for (message, task), text in zip(known, texts, strict=True)]
        )
        return self.rewards


def prompt_ids(tokenizer: Any, message: str) -> list[int]:
    """A user message as the policy sees it; it begins with <|im_start|>, which is BOS as well."""
    ids: list[int] = tokenizer(smol.render(message), add_special_tokens=False).input_ids
    return ids
