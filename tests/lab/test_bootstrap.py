"""Bootstrap intervals and paired tests: as scipy's on the same data, and as often right as said."""

import numpy as np
import pytest
import scipy.stats

from guided_decode.lab.bootstrap import bootstrap, bootstrap_of_rewards
from guided_decode.lab.intervals import wilson
from guided_decode.lab.paired_tests import holm, sign_flip_test

RNG = np.random.default_rng(5)
SAMPLES = {
    "rewards of a model": RNG.normal(1.3, 0.8, 60),
    "skewed": RNG.lognormal(0.0, 1.0, 40),
    "right or wrong": (RNG.random(80) < 0.8).astype(float),
    "means of three seeds": RNG.integers(0, 4, 50) / 3,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_an_interval_is_scipys_of_the_same_draws(name):
    values = SAMPLES[name]
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=2_000, method="BCa",
                                   rng=np.random.default_rng(7))  # fmt: skip
    ours = bootstrap(values, draws=2_000, seed=7)
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=1e-12)


def test_draws_that_do_not_fit_at_once_are_the_same_draws(monkeypatch):
    values = SAMPLES["skewed"]
    whole = bootstrap(values, draws=500)
    monkeypatch.setattr("guided_decode.lab.bootstrap._AT_ONCE", 1_000)
    assert bootstrap(values, draws=500) == whole


def test_values_without_spread_have_their_mean_or_wilsons_interval():
    assert bootstrap([0.4] * 9) == bootstrap_of_rewards([0.4] * 9)
    assert bootstrap([0.4] * 9).low == bootstrap([0.4] * 9).high == 0.4
    right = bootstrap_of_rewards([1.0] * 40)
    assert (right.mean, right.low, right.high) == (1.0, *wilson(40, 40))
    assert right.low < 0.92
    wrong = bootstrap_of_rewards([0.0] * 40)
    assert (wrong.low, wrong.high) == wilson(0, 40)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]]])
def test_what_is_no_list_of_numbers_is_refused(values):
    for function in (bootstrap, bootstrap_of_rewards, sign_flip_test):
        with pytest.raises(ValueError, match="expected a list of finite numbers"):
            function(values)


def _beta_bernoulli(rng, n=80, seeds=2):
    difficulty = rng.beta(2.5, 1.2, n)
    return (rng.random((n, seeds)) < difficulty[:, None]).mean(axis=1), 2.5 / 3.7


def _scores(rng, n=80):
    return rng.gamma(4.0, 0.5, n), 2.0


def _paired(rng, n=80):
    difficulty = rng.beta(2.0, 2.0, n)
    lift = 0.1
    first = rng.random(n) < np.minimum(1.0, difficulty + lift)
    second = rng.random(n) < difficulty
    # E[min(1, d + 0.1)] − E[d], d ~ Beta(2, 2).
    truth = scipy.stats.beta(2, 2).expect(lambda d: np.minimum(1.0, d + lift) - d)
    return first.astype(float) - second, truth


@pytest.mark.slow
@pytest.mark.parametrize("draw", [_beta_bernoulli, _scores, _paired])
def test_ninety_five_percent_intervals_hold_the_truth_that_often(draw):
    rng = np.random.default_rng(11)
    held = 0
    for seed in range(1_000):
        values, truth = draw(rng)
        held += not bootstrap(values, draws=800, seed=seed).leaves_out(truth)
    assert 930 <= held <= 970, held


def test_signs_are_counted_as_mcnemar_counts_them():
    # 14 prompts that one method alone gets right, 5 that the other does, 40 with the same end.
    differences = [1.0] * 14 + [-1.0] * 5 + [0.0] * 40
    assert sign_flip_test(differences) == pytest.approx(
        scipy.stats.binomtest(14, 19).pvalue, rel=1e-12
    )
    assert sign_flip_test([-each for each in differences]) == sign_flip_test(differences)


@pytest.mark.parametrize("scale", [3, 100, None])
def test_p_is_scipys_over_all_signs(scale):
    rng = np.random.default_rng(scale)
    differences = rng.normal(0.3, 0.6, 12)
    if scale is not None:
        differences = np.rint(differences * scale) / scale
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    # Without a step that they share they are drawn: 20,000 draws, here within 5 of their errors.
    exact = scale is not None
    assert sign_flip_test(differences) == pytest.approx(
        theirs, rel=1e-9 if exact else 0, abs=0 if exact else 5 * np.sqrt(theirs / 20_000)
    )


def test_differences_that_are_all_nothing_have_no_evidence():
    assert sign_flip_test([0.0, 0.0]) == 1.0


def test_p_is_below_a_twentieth_that_often_where_nothing_differs():
    rng = np.random.default_rng(3)
    low = sum(sign_flip_test(rng.normal(0, 1, 30), draws=400, seed=i) <= 0.05 for i in range(1000))
    assert 30 <= low <= 70


def test_holms_p_values():
    # The example of Holm's paper by hand: the smallest counts for all, the next for one less.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
