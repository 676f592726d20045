"""Rewards, GAE, whitening: each against the plainest way to compute it."""

from dataclasses import replace

import pytest
import torch

from recipes.ppo import PPOConfig
from recipes.ppo.advantages import (
    final_scores,
    generalized_advantages,
    masked_mean,
    token_rewards,
    whiten,
)
from recipes.ppo.losses import policy_loss, value_loss

LENGTHS = (5, 1, 3)


@pytest.fixture
def mask() -> torch.Tensor:
    return (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).float()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_the_sum_over_future_errors(
    mask: torch.Tensor, gamma: float, lam: float
) -> None:
    values, rewards = noise(3, 5), noise(5, 3).T
    advantages, returns = generalized_advantages(values, rewards, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected = 0.0
            for u in range(t, length):
                following = values[row, u + 1] if u + 1 < length else 0.0
                error = rewards[row, u] + gamma * following - values[row, u]
                expected += (gamma * lam) ** (u - t) * error
            assert advantages[row, t] == pytest.approx(float(expected), abs=1e-5)
            assert returns[row, t] == pytest.approx(float(expected + values[row, t]), abs=1e-5)
    assert not (advantages * (1 - mask)).any()
    assert not (returns * (1 - mask)).any()


def test_with_lambda_1_returns_are_the_rewards_to_come(mask: torch.Tensor) -> None:
    rewards = noise(3, 5) * mask
    _, returns = generalized_advantages(noise(3, 5), rewards, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(-1).cumsum(-1).flip(-1) * mask
    torch.testing.assert_close(returns, to_come, atol=1e-5, rtol=0)


def test_score_is_paid_at_the_last_token_and_kl_at_every_token(mask: torch.Tensor) -> None:
    logps, reference = noise(3, 5), noise(5, 3).T
    scores = torch.tensor([1.0, 2.0, 3.0])
    rewards = token_rewards(logps, reference, scores, mask, kl_coef=0.5)
    for row, length in enumerate(LENGTHS):
        for t in range(5):
            expected = -0.5 * float(logps[row, t] - reference[row, t]) if t < length else 0.0
            expected += float(scores[row]) if t == length - 1 else 0.0
            assert rewards[row, t] == pytest.approx(expected, abs=1e-6)


def test_a_response_that_does_not_end_earns_minus_ten_before_gain_and_bias() -> None:
    config = PPOConfig(reward_gain=2.0, reward_bias=3.0)
    scores = final_scores(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), config)
    assert scores.tolist() == [5.0, -17.0]
    left = final_scores(
        torch.tensor([1.0, 1.0]),
        torch.tensor([True, False]),
        replace(config, unfinished_score=None),
    )
    assert left.tolist() == [5.0, 5.0]


def test_whitening_sees_only_generated_tokens(mask: torch.Tensor) -> None:
    x = noise(3, 5) * 7 + 4
    white = whiten(x + 1e6 * (1 - mask), mask)
    kept = white[mask.bool()]
    assert kept.mean().abs() < 1e-5
    assert kept.var(unbiased=False) == pytest.approx(1.0, abs=1e-4)
    assert not (white * (1 - mask)).any()


def test_policy_loss_stops_at_the_clip(mask: torch.Tensor) -> None:
    old = torch.zeros(3, 5)
    advantages = torch.ones(3, 5)
    inside, none = policy_loss(torch.full((3, 5), 0.1), old, advantages, mask, 0.2)
    outside, every = policy_loss(torch.full((3, 5), 0.9), old, advantages, mask, 0.2)
    assert inside == pytest.approx(-torch.tensor(0.1).exp().item())
    assert outside == pytest.approx(-1.2)
    assert (none, every) == (0.0, 1.0)
    # A bad token that became likelier is never let off.
    worse, _ = policy_loss(torch.full((3, 5), 0.9), old, -advantages, mask, 0.2)
    assert worse == pytest.approx(torch.tensor(0.9).exp().item())


def test_value_loss_takes_the_larger_of_plain_and_clipped_error() -> None:
    mask, old, returns = torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1)
    assert value_loss(torch.full((1, 1), 0.5), old, returns, mask, 0.2) == pytest.approx(0.32)
    assert value_loss(torch.full((1, 1), -1.0), old, returns, mask, 0.2) == pytest.approx(2.0)


def test_masked_mean_divides_by_generated_tokens(mask: torch.Tensor) -> None:
    assert masked_mean(torch.ones(3, 5), mask) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"kl_coef": -0.1}, "kl_coef must not be negative"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\]"),
        ({"policy_lr": float("nan")}, "policy_lr must be positive, got nan"),
    ],
)
def test_config_refuses(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**change)
