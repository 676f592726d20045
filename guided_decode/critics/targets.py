"""What a critic is trained towards: outcomes, or λ-returns of its own values; and its losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from guided_decode.critics.config import Loss
from guided_decode.critics.rollout import Rollout

# Outcome classes: those of value-guided search (arXiv 2505.17373), whose value is class 1.
CLASSES = ("wrong", "right", "unfinished")


def outcome_targets(rollouts: Sequence[Rollout], loss: Loss) -> Tensor:
    """What each rollout came to, float32 [rollouts, labels].

    "squared": its reward. "cross-entropy": the probabilities of `CLASSES`, "right" having the
    reward, and the rest being "wrong" or, where no end-of-sequence token was written, "unfinished".

    Raises ValueError: cross-entropy with a reward outside 0 to 1.
    """
    rewards = torch.tensor([each.reward for each in rollouts])
    if loss == "squared":
        return rewards[:, None]
    odd = rewards[(rewards < 0.0) | (rewards > 1.0)]
    if len(odd):
        raise ValueError(
            f'loss="cross-entropy" came with a reward of {odd[0].item():g}: expected rewards from '
            '0 (wrong) to 1 (right); pass loss="squared"'
        )
    finished = torch.tensor([each.finished for each in rollouts])
    rest = 1.0 - rewards
    return torch.stack([rest * finished, rewards, rest * ~finished], -1)


def lambda_returns(
    values: Tensor,  # [rows, width, labels] float32
    outcomes: Tensor,  # [rows, labels] float32
    lengths: Tensor,  # [rows] int64
    lam: float,
) -> Tensor:
    """Targets of TD(λ), undiscounted, where nothing is paid before the end: [rows, width, labels].

        G_last = outcome
        G_t    = (1 − λ) · V(s_t+1) + λ · G_t+1

    Args:
        values: V of each prefix of a row's response; of classes, their probabilities.
        outcomes: what each row came to.
        lengths: how many prefixes a row has; what is behind them is 0.
        lam: 1 gives the outcome everywhere (Monte Carlo), 0 the next prefix's value.
    """
    targets = torch.zeros_like(values)
    running = torch.zeros_like(outcomes)
    for step in reversed(range(values.shape[1])):
        last = (lengths - 1 == step)[:, None]
        if step + 1 < values.shape[1]:
            running = (1.0 - lam) * values[:, step + 1] + lam * running
        running = torch.where(last, outcomes, running)
        targets[:, step] = torch.where((step < lengths)[:, None], running, 0.0)
    return targets


def values_of(outputs: Tensor, loss: Loss) -> Tensor:
    """A head's outputs as what targets are made of: values, or probabilities of classes."""
    return outputs if loss == "squared" else outputs.softmax(-1)


def losses_of(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Each prefix's loss, float32 [...], of outputs and targets [..., labels]."""
    if loss == "squared":
        return (outputs - targets).square()[..., 0]
    return -(targets * F.log_softmax(outputs, -1)).sum(-1)
