"""Features and targets along rollouts: one of each for every prefix that a token follows.

Both are read at positions PL−1 … L−2 (PL: tokens of the prompt, L: of the whole): at the token
before each generated one, as PPO trainers read their critics. So the head is never trained at EOS,
and terminals follow the rule "baseline".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from guided_decode.checkpoints.checkpoint import Checkpoint
from recipes.trunk_head.rollouts import Rollout


@dataclass(frozen=True)
class Readings:
    """features: float32 [tokens, hidden], after the final norm. rollout: int64 [tokens], whose."""

    features: Tensor
    rollout: Tensor


@torch.no_grad()
def read_rollouts(
    policy: PreTrainedModel, rollouts: Sequence[Rollout], batch_size: int = 64
) -> Readings:
    """The frozen policy's last hidden states along its rollouts."""
    features: list[Tensor] = []
    for rows in _batches(rollouts, batch_size):
        hidden = _hidden(policy.base_model, [row.prompt + row.response for row in rows])
        for row, states in zip(rows, hidden, strict=True):
            features.append(states[_places(row, 0)].float().cpu())
    sizes = torch.tensor([len(each) for each in features])
    return Readings(torch.cat(features), torch.arange(len(rollouts)).repeat_interleave(sizes))


def reward_targets(rollouts: Sequence[Rollout]) -> Tensor:
    """The return of each prefix, undiscounted: its rollout's reward, float32 [tokens].

    Raises ValueError: a rollout without a reward.
    """
    missing = sum(row.reward is None for row in rollouts)
    if missing:
        raise ValueError(f"{missing} of {len(rollouts)} rollouts have no reward: pass a critic.")
    return torch.cat([torch.full((len(row.response),), float(row.reward or 0)) for row in rollouts])


@torch.no_grad()
def critic_targets(critic: Checkpoint, rollouts: Sequence[Rollout], batch_size: int = 64) -> Tensor:
    """V of each prefix by an existing critic, read as its family asks; float32 [tokens]."""
    bos = None if critic.tokenizer is None else critic.tokenizer.bos_token_id
    drops = critic.family.bos == "drop"
    values = []
    for rows in _batches(rollouts, batch_size):
        skips = [int(drops and len(row.prompt) > 1 and row.prompt[0] == bos) for row in rows]
        ids = [(row.prompt + row.response)[skip:] for row, skip in zip(rows, skips, strict=True)]
        for row, skip, states in zip(rows, skips, _hidden(critic.trunk, ids), strict=True):
            bias = 0.0 if critic.head_bias is None else critic.head_bias
            output = states[_places(row, skip)].float() @ critic.head_weight.T + bias
            values.append(critic.transform(output).cpu())
    return torch.cat(values)


def _places(row: Rollout, skip: int) -> slice:
    first = len(row.prompt) - skip - 1
    return slice(first, first + len(row.response))


def _batches(rollouts: Sequence[Rollout], size: int) -> Iterator[Sequence[Rollout]]:
    for start in range(0, len(rollouts), size):
        yield rollouts[start : start + size]


def _hidden(trunk: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """Hidden states of rows that are padded on the right, where no token looks."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=trunk.device)
    hidden: Tensor = trunk(input_ids=ids, use_cache=False).last_hidden_state
    return hidden
