"""The demo's figures against what they are defined by."""

import math

import pytest
import torch
from scipy.stats import binomtest

from guided_decode.lab.demo.divergences import best_of_kl, greedy_kl, sampled_kl
from guided_decode.lab.intervals import wilson


@pytest.mark.parametrize(("right", "of"), [(0, 10), (1, 10), (50, 100), (97, 100), (100, 100)])
def test_wilson_is_the_wilson_interval(right, of):
    interval = binomtest(right, of).proportion_ci(method="wilson")
    assert wilson(right, of) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_wilson_refuses_what_is_no_proportion():
    for right, of in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="expected a count out of at least one"):
            wilson(right, of)


def test_sampled_kl_is_torchs_where_nothing_is_masked():
    generator = torch.Generator().manual_seed(0)
    guided, plain = torch.randn(2, 5, 30, generator=generator)
    expected = torch.nn.functional.kl_div(
        plain.log_softmax(-1), guided.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(sampled_kl(guided, plain), expected)


def test_sampled_kl_of_masked_candidates_is_the_mass_that_was_cut():
    plain = torch.tensor([[0.5, 0.3, 0.2]]).log()
    guided = plain.clone()
    guided[0, 2] = -torch.inf
    assert sampled_kl(guided, plain).item() == pytest.approx(-math.log(0.8))
    assert sampled_kl(plain, plain).item() == 0.0


def test_greedy_kl_is_the_surprise_of_the_chosen_token():
    plain = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert greedy_kl(torch.tensor([1]), plain).item() == pytest.approx(-math.log(0.3))


def test_best_of_n_diverges_by_no_more_than_its_bound():
    assert best_of_kl(1) == 0.0
    # Over a continuum of distinct responses the bound is met: density n·F^(n−1).
    f = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)[1:]
    density = 8 * f**7
    exact = torch.trapezoid(density * density.log(), f).item()
    assert best_of_kl(8) == pytest.approx(exact, abs=1e-4)
