"""A report card's figures, against other libraries', hand calculations and brute force."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.critics.rollout import Rollout
from guided_decode.lab.ranks import auc, spearman
from guided_decode.lab.report_card.card import Guided, make_card
from guided_decode.lab.report_card.guidance import Positions, read_positions, spread, suggest
from guided_decode.lab.report_card.measures import (
    FRACTIONS,
    bellman_residual,
    calibration,
    last_step_error,
    rank_at,
    threshold_of,
    value_at,
)
from guided_decode.lab.report_card.plot import draw
from guided_decode.scorer import Scores
from tests import models


def drawn(count=200, seed=0, graded=False):
    """Values along responses of several lengths, with ties, and what these came to."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=count) if graded else rng.integers(0, 2, count).astype(float)
    values = [
        torch.tensor(np.round(reward * 0.6 + rng.normal(size=rng.integers(1, 30)), 1))
        for reward in rewards
    ]
    return [each.float() for each in values], rewards.tolist()


def test_auc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    values, rewards = drawn()
    for fraction in FRACTIONS:
        read = [value_at(each, fraction) for each in values]
        assert rank_at(values, rewards, fraction).auc == pytest.approx(
            metrics.roc_auc_score(rewards, read), abs=1e-12
        )


def test_the_calibration_curve_is_scikit_learns_and_its_error_follows_from_it():
    curves = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed")
    values, rewards = drawn()
    values = [each.sigmoid() for each in values]
    bins, error = calibration(values, rewards)
    came_to = np.repeat(rewards, [len(each) for each in values])
    read = torch.cat(values).double().numpy()
    true, predicted = curves.calibration_curve(came_to, read, n_bins=10, strategy="quantile")
    np.testing.assert_allclose([each.reward for each in bins], true)
    np.testing.assert_allclose([each.value for each in bins], predicted)
    weights = np.array([each.count for each in bins]) / len(read)
    assert error == pytest.approx(float((weights * np.abs(true - predicted)).sum()))


def test_ranks_are_scipys():
    values, rewards = drawn(graded=True)
    read = [value_at(each, 0.5) for each in values]
    assert spearman(read, rewards) == pytest.approx(scipy.stats.spearmanr(read, rewards)[0])
    right = np.array(rewards) > np.median(rewards)
    first, second = np.array(read)[right], np.array(read)[~right]
    won = scipy.stats.mannwhitneyu(first, second).statistic
    assert auc(read, right) == pytest.approx(won / (len(first) * len(second)))
    found = rank_at(values, rewards, 0.5)
    assert (found.auc, found.spearman) == (auc(read, right), spearman(read, rewards))
    assert math.isnan(spearman([1.0, 1.0], [0.0, 1.0]))


def test_calibration_by_hand():
    """Two bins: values up to the median 0.3, and above it."""
    values = [torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.3, 0.8])]
    bins, error = calibration(values, [1.0, 0.0], bins=2)
    low, high = bins
    assert (low.count, high.count) == (3, 2)
    assert (low.value, low.reward) == pytest.approx((0.2, 2 / 3))
    assert (high.value, high.reward) == pytest.approx((0.85, 0.5))
    assert error == pytest.approx((3 * (2 / 3 - 0.2) + 2 * 0.35) / 5)


def test_bellman_residual_by_hand():
    values = [torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.0]), torch.tensor([1.0, 0.0])]
    assert bellman_residual(values) == pytest.approx((0.25**2 + 0.75**2 + 1.0) / 3)
    assert last_step_error(values, [1.0, 0.5, 1.0]) == pytest.approx((0.0 + 0.25 + 1.0) / 3)
    assert bellman_residual(values[1:2]) is None


def test_values_are_read_after_a_share_of_the_tokens_rounded_up():
    values = torch.arange(6.0)  # the prompt's, and five tokens'
    assert [value_at(values, each) for each in FRACTIONS] == [2.0, 3.0, 4.0, 5.0]


def test_what_counts_as_right():
    assert threshold_of([0.0, 1.0, 1.0]) == 0.5
    assert threshold_of([-10.0, 2.0]) == -4.0
    assert threshold_of([1.0, 2.0, 9.0, 10.0]) == 5.5
    assert rank_at([torch.zeros(1), torch.ones(1)], [1.0, 1.0], 0.5).auc is None


@pytest.fixture(scope="module")
def parts():
    """A policy, its critic, and responses."""
    policy, critic = models.tiny("llama", "lm", 1), models.tiny("llama", "token", 2)
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout(tuple(row[:3]), (*row[3:], models.EOS), float(i % 2), True)
        for i, row in enumerate(torch.randint(3, 90, (6, 8), generator=generator).tolist())
    ]
    return policy, critic, load_scorer(critic, "verl-critic"), rollouts


def positions_of(parts, config, count=999):
    policy, _, scorer, rollouts = parts
    return read_positions(
        policy, scorer, rollouts, config, terminals=[models.EOS], count=count, seed=0
    )


@pytest.mark.parametrize("tail", ["mask", "keep"])
def test_kl_is_that_of_the_rule_over_the_whole_vocabulary(parts, tail):
    """The oracle: each position's whole logits, guided by a critic's stock forward."""
    policy, critic, _, rollouts = parts
    config = GuidanceConfig(beta=0.7, top_k=5, tail=tail)
    total, count = 0.0, 0
    for one in rollouts:
        for t in range(len(one.response)):
            prefix = one.ids[: len(one.prompt) + t]
            logits = policy(torch.tensor([prefix])).logits[0, -1]
            chosen = logits.topk(5).indices.tolist()
            q = torch.full_like(logits, -math.inf) if tail == "mask" else logits.clone()
            v = oracle_value(critic, prefix)
            for a in chosen:
                own = 0.0 if a == models.EOS else oracle_value(critic, (*prefix, a)) - v
                q[a] = logits[a] + 0.7 * own
            log_q, log_p = q.log_softmax(-1), logits.log_softmax(-1)
            total += float(torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0.0).sum())
            count += 1
    assert positions_of(parts, config).kl(config) == pytest.approx(total / count, rel=1e-4)


def oracle_value(critic, ids):
    return float(critic(torch.tensor([list(ids)])).logits[0, -1, 0])


def test_a_suggested_beta_costs_its_budget(parts):
    config = GuidanceConfig(beta=0.0, top_k=8, tail="keep")
    positions = positions_of(parts, config)
    for budget in (0.01, 0.1):
        found = suggest(positions, config, budget)
        assert positions.kl(config.changed(beta=found.beta)) == pytest.approx(budget, rel=1e-3)
    beyond = suggest(positions, config, 50.0)
    assert beyond.beta is None
    assert "no beta costs more than" in beyond.reason
    masked = GuidanceConfig(beta=0.0, top_k=2)
    below = suggest(positions_of(parts, masked), masked, 1e-6)
    assert below.beta is None
    assert "top_k=2 alone costs" in below.reason


def test_positions_are_drawn_by_seed_and_at_most_all(parts):
    config = GuidanceConfig(beta=0.0, top_k=4)
    assert len(positions_of(parts, config).logits) == 6 * 6
    few = positions_of(parts, config, count=7)
    assert len(few.logits) == 7
    torch.testing.assert_close(few.advantages, positions_of(parts, config, count=7).advantages)


def test_the_spread_of_advantages_by_hand():
    logits = torch.tensor([[0.0, 0.0, -1.0], [math.log(3.0), 0.0, 0.0]])
    scores = Scores(torch.tensor([[2.0, 1.0], [5.0, 1.0]]), torch.tensor([1.0, 1.0]))
    found = spread(Positions(logits, torch.tensor([[0, 1], [0, 1]]), scores, None))
    # Advantages 1 and 0 at halves; 4 and 0 at 3/4 and 1/4.
    deviations = [0.5, math.sqrt(0.75 * 1.0 + 0.25 * 9.0)]
    assert found.mean == pytest.approx(sum(deviations) / 2)
    assert found.range == pytest.approx((1 + 4) / 2)
    exempt = torch.tensor([[True, False], [False, False]])
    ended = Positions(logits, torch.tensor([[0, 1], [0, -1]]), scores, exempt)
    assert spread(ended).range == 0.0
    assert ended.advantages[0].tolist() == [0.0, 0.0]


def test_a_card_is_json_text_and_a_picture(parts, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    policy, _, scorer, rollouts = parts
    from guided_decode.critics.values import values_along

    guided = Guided(policy, [models.EOS], GuidanceConfig(beta=0.0, top_k=4, tail="keep"), (0.01,))
    values = values_along(scorer, rollouts)
    card = make_card(values, rollouts, scorer="it", policy="p", scored_by=scorer, guided=guided)
    back = json.loads(json.dumps(card.as_dict(), allow_nan=False))
    assert back["bellman_residual"] == bellman_residual(values)
    assert (back["rollouts"], back["tokens"], back["positions"]) == (6, 36, 36)
    assert [each["fraction"] for each in back["ranks"]] == [*FRACTIONS]
    text = card.markdown()
    assert "6 rollouts of p on 6 prompts" in text
    assert f"| 50% | {card.ranks[1].auc:.3f} |" in text
    assert f"| 0.01 | {card.suggestions[0].beta:.3g} |" in text
    draw(card, tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")
    bare = make_card(values, rollouts, scorer="it")
    draw(bare, tmp_path / "bare.png")
    assert "beta" not in bare.markdown()
    with pytest.raises(ValueError, match="needs rollouts that were held out"):
        make_card([], [], scorer="it")
    with pytest.raises(ValueError, match=r"budget=0.0: expected nats a token"):
        Guided(policy, [], guided.config, (0.0,))
