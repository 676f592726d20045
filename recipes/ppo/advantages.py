"""Rewards, advantages and returns over padded responses; all tensors float32 [rows, width]."""

import torch
from torch import Tensor

from recipes.ppo.config import PPOConfig


def final_scores(scores: Tensor, finished: Tensor, config: PPOConfig) -> Tensor:
    """What a response earns at its last token, float32 [rows].

    `unfinished_score`, where there is one, replaces the score of a response that does not end with
    EOS; then gain and bias are applied, as in EasyLM.
    """
    if config.unfinished_score is not None:
        unfinished = torch.full_like(scores, config.unfinished_score)
        scores = torch.where(finished, scores, unfinished)
    return scores * config.reward_gain + config.reward_bias


def token_rewards(
    logps: Tensor,  # [rows, width] log-probability of each generated token
    reference_logps: Tensor,  # [rows, width]
    scores: Tensor,  # [rows] paid at the last generated token
    mask: Tensor,  # [rows, width] 1 on generated tokens
    kl_coef: float,
) -> Tensor:
    """Reward of each generated token: −kl_coef·(log p − log p_ref), and the score at the last."""
    rewards = -kl_coef * (logps - reference_logps) * mask
    last = mask.sum(-1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def generalized_advantages(
    values: Tensor,  # [rows, width] V before each generated token
    rewards: Tensor,  # [rows, width]
    mask: Tensor,  # [rows, width]
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages of GAE (arXiv 1506.02438) and returns (advantage + value); 0 where masked.

    The value after the last token is 0: the output at EOS is never a target.
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * following - values) * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for step in reversed(range(values.shape[1])):
        running = deltas[:, step] + gamma * lam * running
        advantages[:, step] = running
    return advantages, (advantages + values) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens where `mask` is 1, a scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the tokens where `mask` is 1; 0 elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    variance = masked_mean(centred**2, mask)
    return centred * torch.rsqrt(variance + 1e-8)
