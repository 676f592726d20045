"""Thresholds from rollouts: the bound of split conformal prediction, and what it takes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_decode import GuidanceConfig, guide, load_scorer
from guided_decode.critics.rollout import Rollout
from guided_decode.guidance.terminal import score_candidates
from guided_decode.lab.calibration.conformal import (
    least_of,
    lower_threshold,
    one_a_prompt,
    upper_threshold,
)
from guided_decode.lab.calibration.trajectories import ended, ended_at, lowest, prune_gaps, pruned
from tests import models


@settings(max_examples=40)
@given(st.lists(st.floats(-5, 5), min_size=19, max_size=80), st.sampled_from([0.05, 0.1, 0.29]))
def test_leaving_any_one_out_at_most_alpha_of_them_fall_below_their_bound(minima, alpha):
    """Exchangeability in the flesh: of n + 1 responses, as many as floor(alpha · (n + 1)) may fall
    below the bound that the other n set."""
    count = len(minima)
    if math.floor(alpha * count + 1e-9) < 1:
        return
    below = sum(
        minima[i] < lower_threshold(minima[:i] + minima[i + 1 :], alpha).value for i in range(count)
    )
    assert below <= math.floor(alpha * count + 1e-9)


def test_the_bound_is_the_floor_of_alpha_n_plus_1_smallest():
    minima = [float(n) for n in np.random.default_rng(0).permutation(99)]
    found = lower_threshold(minima, 0.05)
    assert (found.value, found.rank, found.of) == (4.0, 5, 99)
    # 0.29 · 100 is a little less than 29 in floating point.
    assert lower_threshold(minima, 0.29).rank == 29
    assert upper_threshold(minima, 0.05).value == 94.0
    draws = np.random.default_rng(1).normal(size=(400, 60))
    share = np.mean([row[-1] < lower_threshold(row[:-1].tolist(), 0.1).value for row in draws])
    # 6 of 60; four standard errors.
    assert share == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 400))


def test_too_few_good_responses_are_refused_with_how_many_it_takes():
    assert (least_of(0.05), least_of(0.1), least_of(0.3)) == (19, 9, 3)
    assert lower_threshold([1.0] * 19, 0.05).rank == 1
    with pytest.raises(ValueError, match="0.05 cannot be kept with 18 .*expected at least 19"):
        lower_threshold([1.0] * 18, 0.05)
    for alpha in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            lower_threshold([1.0] * 50, alpha)


def test_one_response_of_each_prompt_is_drawn_whatever_it_came_to():
    rollouts = [Rollout((n // 4,), (n,), float(n % 4 == 0), True) for n in range(40)]
    drawn = one_a_prompt(rollouts, seed=3)
    assert [rollouts[i].prompt[0] for i in drawn] == list(range(10))
    assert drawn == one_a_prompt(rollouts, seed=3)
    counts = np.bincount([one_a_prompt(rollouts[:4], seed)[0] for seed in range(400)], minlength=4)
    assert counts.min() > 60


def test_what_abstention_would_have_done():
    values = [torch.tensor(v) for v in ([0.5, 0.4, 0.1, 0.6], [0.05, 0.4], [0.9, 0.9, 0.05])]
    assert [lowest(v, 1) for v in values] == pytest.approx([0.1, 0.4, 0.05])
    assert lowest(values[1], 2) == math.inf
    assert [ended_at(v, 0.2, 1) for v in values] == [2, None, 2]
    assert [ended_at(v, 0.2, 3) for v in values] == [None, None, None]
    share = ended(values, 0.2, 1)
    assert (share.interrupted, share.of, share.tokens, share.saved) == (2, 3, 9, 3)
    assert share.saved_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("own", [
    {},
    {"tail": "keep", "top_k": 4},
    {"gate": 0.3},
    {"value_gate": 0.5, "value_gate_fall": 0.6},
], ids=["mask", "keep", "gate", "value-gate"])  # fmt: skip
def test_a_margin_prunes_just_the_tokens_whose_gap_is_larger(own):
    """Against the rule itself: with a margin below and above each token's gap."""
    policy = models.tiny("llama", "lm", seed=1)
    scorer = load_scorer(models.tiny("llama", "token"), kind="verl-critic")
    config = GuidanceConfig(**({"rule": "prune", "margin": 0.0, "top_k": 12} | own))
    (prompt,) = models.prompts([6], seed=4)
    torch.manual_seed(1)
    sampled = policy.generate(torch.tensor([prompt]), do_sample=True, max_new_tokens=16,
                              min_new_tokens=16, top_k=20)  # fmt: skip
    response = (*sampled[0, len(prompt) :].tolist()[:-1], models.EOS)
    rollout = Rollout(tuple(prompt), response, 1.0, True)
    (gaps,) = prune_gaps(policy, scorer, [rollout], config, [models.EOS])
    assert len(gaps) == len(response)
    none = torch.empty(1, 0, dtype=torch.int64)
    before, passed, outside = math.nan, 0, 0
    for t, token in enumerate(response):
        prefix = [*prompt, *response[:t]]
        logits = policy(torch.tensor([prefix])).logits[:, -1].float()
        value = float(scorer.score([prefix], none).baseline)
        sure = config.gate is not None and float(logits.softmax(-1).max()) >= config.gate
        active = torch.tensor([not sure and config.is_open(value, before)])
        before = value
        candidates = logits.topk(config.top_k).indices
        scores, exempt = score_candidates(scorer, [prefix], candidates, [[models.EOS]])

        def left(margin, logits=logits, candidates=candidates, scores=scores, exempt=exempt,
                 active=active):  # fmt: skip
            ruled = config.changed(margin=margin)
            return guide(logits, candidates, scores, ruled, exempt=exempt, active=active)[0]

        passed += not bool(active)
        gap = float(gaps[t])
        if gap == math.inf:
            outside += 1
            assert left(1e9)[token] == -math.inf
            continue
        assert left(gap + 1e-4)[token] > -math.inf
        if gap > 1e-3:
            assert left(gap - 1e-4)[token] == -math.inf
    assert bool((gaps > 1e-3).any())
    assert (passed > 0) == bool({"gate", "value_gate"} & set(own))
    assert outside == 0 or config.tail == "mask"
    hit = pruned([gaps], float(gaps[gaps < math.inf].max()))
    assert hit.interrupted == (outside > 0)
