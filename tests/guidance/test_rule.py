"""Guidance on tensors alone: configs, candidates, and what becomes of their logits."""

import math

import pytest
import torch

from guided_decode import GuidanceConfig, Scores, guide
from guided_decode.guidance.rule import select_candidates

INF = math.inf
NAN = math.nan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": NAN}, "beta=nan"),
        ({"beta": INF}, "beta=inf"),
        ({"beta": "1"}, "beta='1'"),
        ({"rule": "prune"}, "margin"),
        ({"rule": "prune", "margin": NAN}, "margin=nan"),
        ({"rule": "prune", "margin": -0.5}, "margin=-0.5"),
        ({"rule": "keep"}, "rule='keep'.*reweight.*prune"),
        ({"tail": "drop"}, "tail='drop'.*mask.*keep"),
        ({"baseline": "median"}, "baseline='median'.*prefix.*mean"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -3}, "top_k=-3"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"top_p": NAN}, "top_p=nan"),
        ({"gate": 0.0}, r"gate=0\.0"),
        ({"gate": 1.01}, r"gate=1\.01"),
        ({"gate": NAN}, "gate=nan"),
        ({"kl_coef": NAN}, "kl_coef=nan"),
    ],
)
def test_a_config_without_meaning_is_refused_by_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**fields)


def test_a_config_cannot_change_after_it_was_validated():
    config = GuidanceConfig(beta=2.0)
    with pytest.raises(AttributeError):
        config.beta = NAN


def test_defaults_are_the_designs():
    assert GuidanceConfig() == GuidanceConfig(
        beta=1.0,
        top_k=16,
        top_p=1.0,
        rule="reweight",
        margin=None,
        tail="mask",
        baseline="prefix",
        gate=None,
        kl_coef=0.0,
    )


def test_candidates_are_the_largest_logits_in_order():
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, 5.0]])
    assert select_candidates(logits, 3, 1.0).tolist() == [[4, 1, 3]]


def test_ties_go_to_the_lower_token_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0]])
    assert select_candidates(logits, 4, 1.0).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_candidates_of_logits_that_are_trained_on_are_the_same():
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, 5.0]], requires_grad=True)
    with torch.enable_grad():
        assert select_candidates(logits, 3, 1.0).tolist() == [[4, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_vocabulary_of_ties_gives_the_lowest_ids(dtype):
    logits = torch.full((2, 1031), -3.5, dtype=dtype)
    assert select_candidates(logits, 16, 1.0).tolist() == [list(range(16))] * 2


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass_of_the_full_softmax():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, kept in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.95, 4)):
        assert (select_candidates(logits, 4, top_p) >= 0).sum() == kept
    # Not renormalised over the top k: two of four tokens never reach 0.8, so both stay.
    assert select_candidates(logits, 2, 0.8).tolist() == [[0, 1]]


def test_top_p_keeps_at_least_one_candidate():
    logits = torch.tensor([[9.0, 0.0, 0.0]])
    assert select_candidates(logits, 3, 1e-6).tolist() == [[0, -1, -1]]


def test_top_p_of_one_cuts_nothing_however_peaked_the_row():
    logits = torch.tensor([[60.0, 1.0, 0.0, -300.0, -INF]])
    assert select_candidates(logits, 5, 1.0).tolist() == [[0, 1, 2, 3, -1]]


def test_tokens_at_minus_infinity_are_never_candidates():
    logits = torch.tensor([[-INF, 1.0, -INF, 0.0], [-INF, -INF, -INF, -INF]])
    for top_p in (1.0, 0.9):
        chosen = select_candidates(logits, 3, top_p).tolist()
        assert chosen[1] == [-1, -1, -1]
        assert chosen[0][0] == 1
        assert set(chosen[0]) <= {1, 3, -1}


def test_top_k_of_none_is_the_whole_vocabulary():
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(0))
    everything = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    assert torch.equal(select_candidates(logits, None, 1.0), everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 16, 300, 5003])
def test_candidates_of_a_large_vocabulary_with_many_ties(dtype, k):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(4, 5003, generator=generator).mul(2).round().to(dtype)
    logits[1] = 0.0
    logits[2, ::3] = -INF
    logits[3] = torch.where(logits[3] > 0, 0.0, -0.0)
    # A view with strides of its own, as engines hand over.
    strided = logits.t().contiguous().t()
    ordered = torch.sort(logits.float() + 0.0, dim=-1, descending=True, stable=True)
    expected = ordered.indices.masked_fill(ordered.values == -INF, -1)[:, :k]
    assert torch.equal(select_candidates(logits, k, 1.0), expected)
    assert torch.equal(select_candidates(strided, k, 1.0), expected)


def test_top_k_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"5\b.*vocabulary.*4\b"):
        select_candidates(torch.zeros(1, 4), 5, 1.0)


# One row: l, candidates 1, 3, 4 with Q = 2, 0.5, -1 and V = 0.5.
LOGITS = torch.tensor([[0.0, 3.0, -1.0, 2.0, 1.0]])
CANDIDATES = torch.tensor([[1, 3, 4]])
SCORES = Scores(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0.5]))


def guided(**fields):
    arguments = {
        name: fields.pop(name) for name in ("exempt", "log_ratio", "active") if name in fields
    }
    fields.setdefault("top_k", 3)
    return guide(LOGITS, CANDIDATES, SCORES, GuidanceConfig(**fields), **arguments)[0].tolist()


def test_reweight_adds_beta_times_the_advantage():
    assert guided(beta=2.0) == pytest.approx([-INF, 6.0, -INF, 2.0, -2.0])


def test_the_tail_can_be_kept():
    assert guided(beta=2.0, tail="keep") == pytest.approx([0.0, 6.0, -1.0, 2.0, -2.0])


def test_a_negative_beta_steers_away():
    assert guided(beta=-2.0) == pytest.approx([-INF, 0.0, -INF, 2.0, 4.0])


def test_prune_keeps_what_lies_within_the_margin():
    assert guided(rule="prune", margin=1.5) == [-INF, 3.0, -INF, 2.0, -INF]
    assert guided(rule="prune", margin=1.4, tail="keep") == [0.0, 3.0, -1.0, -INF, -INF]
    assert guided(rule="prune", margin=0.0) == [-INF, 3.0, -INF, -INF, -INF]


def test_the_mean_baseline_is_the_mean_of_q_over_the_candidates():
    assert guided(baseline="mean") == pytest.approx([-INF, 4.5, -INF, 2.0, -0.5])


def test_an_exempt_candidate_has_no_advantage_and_is_outside_the_mean():
    exempt = torch.tensor([[False, True, False]])
    assert guided(exempt=exempt, tail="keep") == pytest.approx([0.0, 4.5, -1.0, 2.0, -0.5])
    assert guided(exempt=exempt, baseline="mean") == pytest.approx([-INF, 4.5, -INF, 2.0, -0.5])


def test_an_exempt_candidate_is_neither_pruned_nor_counted_in_the_best_advantage():
    best, worst = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    assert guided(exempt=best, rule="prune", margin=1.6) == [-INF, 3.0, -INF, 2.0, 1.0]
    assert guided(exempt=worst, rule="prune", margin=0.1) == [-INF, 3.0, -INF, -INF, 1.0]


@pytest.mark.parametrize("rule", [{}, {"rule": "prune", "margin": 0.0}, {"baseline": "mean"}])
def test_a_row_whose_every_candidate_is_exempt_keeps_its_logits(rule):
    exempt = torch.ones(1, 3, dtype=torch.bool)
    scores = Scores(torch.full((1, 3), NAN), SCORES.baseline)
    result = guide(LOGITS, CANDIDATES, scores, GuidanceConfig(**rule), exempt=exempt)
    assert result[0].tolist() == [-INF, 3.0, -INF, 2.0, 1.0]


@pytest.mark.parametrize("rule", [{"beta": 3.0}, {"rule": "prune", "margin": 0.0}])
def test_a_gated_row_has_no_advantages_but_its_tail_rule_applies(rule):
    active = torch.tensor([False])
    nothing = Scores(torch.full((1, 3), NAN), torch.tensor([NAN]))
    for tail, outside in (("mask", [-INF, -INF]), ("keep", [0.0, -1.0])):
        config = GuidanceConfig(tail=tail, gate=0.5, **rule)
        result = guide(LOGITS, CANDIDATES, nothing, config, active=active)[0].tolist()
        assert result == [outside[0], 3.0, outside[1], 2.0, 1.0]


def test_the_kl_term_is_part_of_the_advantage():
    ratio = torch.tensor([[1.0, 0.0, -2.0]])
    assert guided(kl_coef=0.5, log_ratio=ratio) == pytest.approx([-INF, 4.0, -INF, 2.0, 0.5])
    # A = 1.5 - 0.5, 0, -1.5 + 1: the third is now within 1.5 of the best.
    assert guided(kl_coef=0.5, log_ratio=ratio, rule="prune", margin=1.5) == [
        -INF, 3.0, -INF, 2.0, 1.0,
    ]  # fmt: skip


def test_the_input_is_not_touched():
    before = LOGITS.clone()
    for config in (GuidanceConfig(), GuidanceConfig(rule="prune", margin=0.1)):
        result = guide(LOGITS, CANDIDATES, SCORES, config)
        assert torch.equal(LOGITS, before)
        assert result.data_ptr() != LOGITS.data_ptr()


def test_beta_zero_with_the_tail_kept_returns_the_same_bits():
    # Denormals, a negative zero and infinities must come back as they went in.
    logits = torch.tensor([[1e-40, -0.0, 3.1, -INF, 7e37]])
    candidates = torch.tensor([[4, 2, 0]])
    config = GuidanceConfig(beta=0.0, tail="keep")
    result = guide(logits, candidates, SCORES, config)
    assert torch.equal(result.view(torch.int32), logits.view(torch.int32))


def test_ragged_candidates_are_guided_alone():
    logits = LOGITS.repeat(2, 1)
    candidates = torch.tensor([[1, 3, 4], [3, -1, -1]])
    values = torch.tensor([[2.0, 0.5, -1.0], [1.5, NAN, NAN]])
    scores = Scores(values, torch.tensor([0.5, 0.5]))
    result = guide(logits, candidates, scores, GuidanceConfig(beta=2.0))
    assert result[1].tolist() == pytest.approx([-INF, -INF, -INF, 4.0, -INF])
    mean = guide(logits, candidates, scores, GuidanceConfig(beta=2.0, baseline="mean"))
    assert mean[1].tolist() == pytest.approx([-INF, -INF, -INF, 2.0, -INF])
    prune = guide(logits, candidates, scores, GuidanceConfig(rule="prune", margin=0.0))
    assert prune[1].tolist() == [-INF, -INF, -INF, 2.0, -INF]


def test_each_row_may_have_its_own_config():
    logits, candidates = LOGITS.repeat(3, 1), CANDIDATES.repeat(3, 1)
    scores = Scores(SCORES.values.repeat(3, 1), SCORES.baseline.repeat(3))
    configs = [
        GuidanceConfig(beta=2.0, tail="keep"),
        GuidanceConfig(rule="prune", margin=1.5),
        GuidanceConfig(baseline="mean"),
    ]
    together = guide(logits, candidates, scores, configs)
    for row, config in enumerate(configs):
        assert torch.equal(together[row : row + 1], guide(LOGITS, CANDIDATES, SCORES, config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_keep_their_type_and_are_guided_to_its_precision(dtype):
    result = guide(LOGITS.to(dtype), CANDIDATES, SCORES, GuidanceConfig(beta=2.0))
    assert result.dtype == dtype
    assert result[0].tolist() == pytest.approx([-INF, 6.0, -INF, 2.0, -2.0], abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_scores_of_any_type_are_weighed_in_float32(dtype):
    """Whatever the tail: steps without one go a shorter way."""
    values = torch.tensor([[3, 1, -2]]).to(dtype)
    scores = Scores(values, torch.tensor([1]).to(dtype))
    masked, kept = (
        guide(LOGITS, CANDIDATES, scores, GuidanceConfig(beta=0.3331, tail=tail))
        for tail in ("mask", "keep")
    )
    expected = LOGITS.gather(1, CANDIDATES) + 0.3331 * torch.tensor([[2.0, 0.0, -3.0]])
    torch.testing.assert_close(masked.gather(1, CANDIDATES), expected, rtol=0, atol=1e-6)
    assert torch.equal(masked.gather(1, CANDIDATES), kept.gather(1, CANDIDATES))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["value", "baseline"])
def test_a_score_that_is_not_finite_is_refused_with_its_row(bad, where):
    values, baseline = SCORES.values.repeat(2, 1), SCORES.baseline.repeat(2)
    if where == "value":
        values[1, 2] = bad
    else:
        baseline[1] = bad
    logits, candidates = LOGITS.repeat(2, 1), CANDIDATES.repeat(2, 1)
    with pytest.raises(ValueError, match=r"\[1\].*(NaN|finite)"):
        guide(logits, candidates, Scores(values, baseline), GuidanceConfig())


def test_kl_coef_without_log_ratios_is_refused():
    with pytest.raises(ValueError, match="log_ratio"):
        guide(LOGITS, CANDIDATES, SCORES, GuidanceConfig(kl_coef=0.1))


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        guide(LOGITS, CANDIDATES[:, :2], SCORES, GuidanceConfig())
    with pytest.raises(ValueError, match=r"2 configs.*1 row"):
        guide(LOGITS, CANDIDATES, SCORES, [GuidanceConfig()] * 2)


def test_a_candidate_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"5\b.*vocabulary.*5 tokens"):
        guide(LOGITS, torch.tensor([[1, 3, 5]]), SCORES, GuidanceConfig())


@pytest.mark.parametrize("ties", [False, True])
def test_candidates_are_contiguous_so_that_callers_may_view_them(ties):
    logits = torch.zeros(3, 9) if ties else torch.arange(27.0).view(3, 9)
    assert select_candidates(logits, 4).is_contiguous()
