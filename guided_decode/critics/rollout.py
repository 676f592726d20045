"""Rollouts: what a policy wrote and what it got for it; and which of them are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response.

    prompt, response: token ids, at least one each; the response with the token that ended it.
    reward: of the whole response. finished: whether an end-of-sequence token ended it.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    reward: float
    finished: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt + self.response

    def prefixes(self, *, at_end: bool) -> int:
        """How many prefixes of it have a value, the prompt alone among them.

        at_end: the whole response is one, as for critics that are read at EOS; else the last one
        is that before its last token, as PPO trainers read theirs.
        """
        return len(self.response) + at_end


def split_by_prompt(
    rollouts: Sequence[Rollout], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of rollouts to train on and of those held out, each in order.

    A prompt's rollouts are all on one side: V could tell a prompt that it has seen from others.

    Args:
        rollouts: of at least two prompts.
        share: of the prompts that are held out, in (0, 1); at least one, and not all.
        seed: of the choice.

    Raises ValueError: a share outside (0, 1), or rollouts of one prompt.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"held_out={share}: expected a share of the prompts between 0 and 1")
    prompts = list(dict.fromkeys(each.prompt for each in rollouts))
    if len(prompts) < 2:
        raise ValueError(
            f"{len(rollouts)} rollouts of {len(prompts)} prompt: expected at least two prompts, "
            "of which one is held out; pass more"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    held_out = {prompts[i] for i in order[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for i, rollout in enumerate(rollouts):
        sides[rollout.prompt in held_out].append(i)
    return sides
