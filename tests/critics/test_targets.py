"""Rollouts, how they are split, and what a critic is trained towards."""

import pytest
import torch

from guided_decode.critics.config import CriticConfig
from guided_decode.critics.rollout import Rollout, split_by_prompt
from guided_decode.critics.targets import CLASSES, lambda_returns, losses_of, outcome_targets


def rollout(prompt, response=(5, 2), reward=1.0, finished=True):
    return Rollout(tuple(prompt), tuple(response), reward, finished)


def test_no_prompt_is_on_both_sides_of_a_split():
    rollouts = [rollout([i % 13, 7], reward=i) for i in range(60)]
    training, held_out = split_by_prompt(rollouts, 0.25, seed=3)
    assert sorted(training + held_out) == list(range(60))
    prompts = [{rollouts[i].prompt for i in side} for side in (training, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == round(0.25 * 13)
    assert split_by_prompt(rollouts, 0.25, seed=3) == (training, held_out)
    assert split_by_prompt(rollouts, 0.25, seed=4) != (training, held_out)


def test_a_split_leaves_prompts_on_both_sides():
    rollouts = [rollout([1]), rollout([2]), rollout([1])]
    for share in (0.01, 0.99):
        training, held_out = split_by_prompt(rollouts, share, seed=0)
        assert training
        assert held_out
    with pytest.raises(ValueError, match="2 rollouts of 1 prompt: expected at least two prompts"):
        split_by_prompt([rollout([1]), rollout([1])], 0.5, seed=0)
    with pytest.raises(ValueError, match="held_out=1.0: expected a share"):
        split_by_prompt(rollouts, 1.0, seed=0)


def test_a_prefix_is_valued_at_each_token_of_the_response_but_where_it_is_read():
    one = rollout([3, 4], [5, 6, 2])
    assert one.prefixes(at_end=False) == 3  # after the prompt, after 5, after 6
    assert one.prefixes(at_end=True) == 4


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_lambda_returns_are_sums_over_n_step_returns(lam):
    """G_t = (1 − λ) Σ_n λ^(n−1) V(s_t+n) + λ^(T−t) · outcome, by their definition."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 2, generator=generator)
    outcomes = torch.randn(3, 2, generator=generator)
    lengths = [5, 1, 3]
    found = lambda_returns(values, outcomes, torch.tensor(lengths), lam)
    for row, length in enumerate(lengths):
        for t in range(length):
            steps = range(1, length - t)
            wanted = sum(
                ((1 - lam) * lam ** (n - 1) * values[row, t + n] for n in steps), torch.zeros(2)
            )
            wanted = wanted + lam ** (length - t - 1) * outcomes[row]
            torch.testing.assert_close(found[row, t], wanted)
        assert not found[row, length:].any()


def test_classes_are_wrong_right_and_unfinished_and_right_has_the_reward():
    rollouts = [
        rollout([1], reward=1.0),
        rollout([1], reward=0.0),
        rollout([1], reward=0.0, finished=False),
        rollout([1], reward=0.25),
    ]
    targets = outcome_targets(rollouts, "cross-entropy")
    assert CLASSES.index("right") == 1
    assert targets.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0.75, 0.25, 0]]
    assert outcome_targets(rollouts, "squared").tolist() == [[1], [0], [0], [0.25]]
    with pytest.raises(ValueError, match='"cross-entropy" came with a reward of 2: expected'):
        outcome_targets([rollout([1], reward=2.0)], "cross-entropy")


def test_losses_are_torchs():
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(4, 6, 3, generator=generator)
    targets = torch.randn(4, 6, 3, generator=generator).softmax(-1)
    wanted = torch.nn.functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none"
    )
    torch.testing.assert_close(losses_of(outputs, targets, "cross-entropy").flatten(), wanted)
    squared = losses_of(outputs[..., :1], targets[..., :1], "squared")
    torch.testing.assert_close(squared, (outputs[..., 0] - targets[..., 0]) ** 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "half"}, "mode='half': expected one of 'full', 'lora', 'head'"),
        ({"target": "reward"}, "target='reward': expected one of"),
        ({"loss": "l1"}, "loss='l1': expected one of"),
        ({"lam": 1.5}, "lam=1.5: expected a number from 0 to 1"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"lr": float("nan")}, "lr=nan: expected a number above 0"),
        ({"width": -1}, "width=-1: expected a number of at least 0"),
        ({"validation": 1.0}, "validation=1.0: expected a number between 0 and 1"),
        ({"target": "scores", "loss": "cross-entropy"}, "scores have no classes"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        CriticConfig(**setting)


def test_what_is_not_given_is_the_modes_own():
    assert CriticConfig().settled().lr == 2e-5
    head = CriticConfig(mode="head", epochs=3).settled()
    assert (head.epochs, head.batch_size, head.lr) == (3, 64, 4e-3)
    assert (head.kind, head.at_end) == ("trunk-head", False)
    assert CriticConfig(loss="cross-entropy").kind == "classifier"
