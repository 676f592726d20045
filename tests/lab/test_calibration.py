"""Calibration: the divergence at any beta, from one decoding; and beta, on its own states."""

import math

import numpy as np
import pytest
import torch

from guided_decode import GuidanceConfig, Scores, guide
from guided_decode.guidance.candidates import select_candidates
from guided_decode.lab.calibration.recorder import Recorder
from guided_decode.lab.calibration.solving import calibrate, solve
from guided_decode.lab.calibration.states import (
    States,
    divergences,
    joined,
    measured,
    spread,
)
from guided_decode.lab.demo.divergences import sampled_kl

ROWS, VOCAB = 6, 40


def logits(seed=0):
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def guided(plain, config, seed=9):
    """By the rule, with values of its own for each token."""
    values = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 0.3
    candidates = select_candidates(plain, config.top_k, config.top_p)
    scores = Scores(values.gather(-1, candidates.clamp(min=0)), values.mean(-1))
    exempt = candidates == candidates[:, :1].where(torch.arange(ROWS)[:, None] < 2, -7)
    return guide(plain, candidates, scores, config, exempt=exempt)


def recorded(config, *, guides=True, lengths=(1,) * ROWS, steps=1):
    recorder = Recorder(lambda ids, l: guided(l, config), config, VOCAB, guides=guides)
    handed_on = [recorder(None, logits(step)) for step in range(steps)]
    return recorder.states(lengths), handed_on


@pytest.mark.parametrize("tail", ["mask", "keep"])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_divergence_at_any_beta_follows_from_what_was_met_at_one(tail, top_p):
    met = GuidanceConfig(beta=1.5, top_k=6, tail=tail, top_p=top_p)
    states, (given,) = recorded(met)
    plain = logits()
    assert torch.equal(given, guided(plain, met))
    for beta in (1.5, 0.2, 8.0, 40.0):
        exact = sampled_kl(guided(plain, met.changed(beta=beta)), plain)
        torch.testing.assert_close(
            divergences(states, beta, tail).float(), exact, rtol=1e-4, atol=1e-5
        )


def test_plain_decoding_is_recorded_and_not_guided():
    config = GuidanceConfig(beta=1.0, top_k=6)
    states, (given,) = recorded(config, guides=False)
    assert torch.equal(given, logits())
    assert torch.equal(states.advantage, recorded(config)[0].advantage)


def test_tokens_behind_the_end_of_a_response_are_none():
    states, _ = recorded(GuidanceConfig(top_k=4), lengths=(3, 1, 2, 3, 0, 1), steps=3)
    assert states.response.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 5]
    whole, _ = recorded(GuidanceConfig(top_k=4), lengths=(3,) * ROWS, steps=3)
    assert torch.equal(states.probability[:3], whole.probability[:3])
    both = joined([states, whole])
    assert (len(both), both.responses) == (28, states.responses + ROWS)


def made(advantage, probability, responses):
    """States of two candidates each, that are all there is."""
    two = torch.tensor([[p, 1 - p] for p in probability], dtype=torch.float64)
    own = torch.tensor([[a, 0.0] for a in advantage], dtype=torch.float64)
    return States(two, own, torch.zeros(len(two), dtype=torch.float64), torch.tensor(responses))


def test_the_standard_error_is_that_of_responses_and_not_of_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 80)
    size = np.repeat(rng.normal(1.0, 0.4, 80), lengths)
    states = made(size, [0.4] * len(size), np.repeat(np.arange(80), lengths).tolist())
    found = measured(states, 1.0, "mask")
    own = divergences(states, 1.0, "mask").numpy()
    sums = np.bincount(states.response.numpy(), own)
    assert found.kl == pytest.approx(sums.sum() / lengths.sum())
    draws = rng.integers(0, 80, (4000, 80))
    resampled = sums[draws].sum(1) / lengths[draws].sum(1)
    assert found.error == pytest.approx(resampled.std(), rel=0.1)
    assert found.interval == pytest.approx((found.kl - 1.96 * found.error,
                                            found.kl + 1.96 * found.error))  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_beta_solves_for_the_target_in_whatever_units_values_are(scale):
    states, _ = recorded(GuidanceConfig(top_k=6, tail="keep"))
    states = States(states.probability, states.advantage * scale, states.rest, states.response)
    for target in (1e-4, 0.02, 0.3):
        beta = solve(states, target, "keep")
        assert measured(states, beta, "keep").kl == pytest.approx(target, rel=1e-4)


def test_targets_out_of_reach_say_how_far_one_gets():
    states, _ = recorded(GuidanceConfig(top_k=3))
    least = measured(states, 0.0, "mask").kl
    with pytest.raises(ValueError, match=rf"at beta 0, lie {least:.4g} nats.*tail=\"keep\""):
        solve(states, least / 2, "mask")
    # At its highest the best candidate is taken always: −log π(a).
    best = states.advantage.masked_fill(states.probability == 0, -math.inf).argmax(-1, True)
    most = -states.probability.gather(-1, best).log().mean().item()
    assert measured(states, solve(states, 0.98 * most, "mask"), "mask").kl < most
    with pytest.raises(ValueError, match=rf"reach at most {most:.4g} nats"):
        solve(states, 1.02 * most, "mask")
    flat = States(states.probability, states.advantage * 0, states.rest, states.response)
    with pytest.raises(ValueError, match="values all candidates alike"):
        solve(flat, 0.9 * most, "mask")


def test_beta_is_right_on_the_states_that_it_visits_itself():
    """Guidance of this kind is soon where there is less to gain: the pilot alone is far off."""

    def visited(beta, number):
        rng = np.random.default_rng(number)
        size = rng.normal(1.0, 0.1, 4000) / (1.0 + beta)
        return made(size, [0.3] * 4000, np.repeat(np.arange(200), 20).tolist())

    target, pilot = 0.02, visited(0.0, 99)
    found = calibrate(visited, pilot, target, "mask", 12)
    assert found.settled
    there = measured(visited(found.beta, 50), found.beta, "mask")
    assert there.kl == pytest.approx(target, rel=0.08)
    alone = solve(pilot, target, "mask")
    assert measured(visited(alone, 50), alone, "mask").kl < 0.6 * target
    hurried = calibrate(visited, pilot, target, "mask", 1)
    assert (hurried.rounds, hurried.settled, hurried.tokens) == (1, False, 4000)


def test_the_spread_of_advantages():
    states = made([0.0, 0.4, 2.0, -1.0], [0.5, 0.5, 0.2, 0.9], [0, 0, 1, 1])
    found = spread(states)
    variances = [0.0, 0.25 * 0.16, 0.16 * 4.0, 0.09]
    assert found.deviation == pytest.approx(math.sqrt(np.mean(variances)))
    assert found.median == pytest.approx(0.7)
    assert found.most == pytest.approx(np.quantile([0.0, 0.4, 2.0, 1.0], 0.99))
    # The best is the less likely one in the last two; at 0.5 the first counts as the likeliest.
    assert found.decisive == 0.5
