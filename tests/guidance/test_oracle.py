"""Guided logits of real models equal brute force, over architectures and every rule."""

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.guidance.step import guide_rows
from tests import models, oracle

LENGTHS = [3, 17, 1, 40, 8, 25]
TERMINALS = [models.EOS, 30, 31, 32, 33, 34, 35, 36, 37]  # some are among the candidates

REWEIGHT = {"beta": 1.7, "top_k": 8}
PRUNE = {"rule": "prune", "margin": 0.8, "top_k": 8}
RULES = {
    "reweight": REWEIGHT,
    "reweight-keep": REWEIGHT | {"tail": "keep"},
    "reweight-mean": REWEIGHT | {"baseline": "mean"},
    "reweight-top-p": REWEIGHT | {"top_p": 0.7, "top_k": 16},
    "reweight-gate": REWEIGHT | {"gate": 0.3},
    "reweight-negative-keep-mean": REWEIGHT | {"beta": -2.0, "tail": "keep", "baseline": "mean"},
    "prune": PRUNE,
    "prune-keep": PRUNE | {"tail": "keep"},
    "prune-mean-top-p": PRUNE | {"baseline": "mean", "top_p": 0.8},
    "prune-gate-keep": PRUNE | {"gate": 0.3, "tail": "keep"},
    "one-candidate": {"top_k": 1, "beta": 3.0, "tail": "keep"},
}


def rows_of(arch: str) -> tuple[list[list[int]], torch.Tensor]:
    """Prefixes of several lengths, and a policy's logits after them."""
    policy = oracle.LogProbs(models.tiny(arch, "lm", seed=1))
    prefixes = models.prompts(LENGTHS, seed=3)
    return prefixes, torch.stack([policy.logits(prefix) for prefix in prefixes])


def assert_equal_brute_force(scorer, brute, config, prefixes, logits, terminals=TERMINALS):
    before = logits.clone()
    guided = guide_rows(scorer, logits, prefixes, config, terminals=terminals)
    assert torch.equal(logits, before)
    for prefix, own, got in zip(prefixes, logits, guided, strict=True):
        oracle.assert_row_equal(got, brute.row(prefix, own, config, terminals))


def test_the_oracle_reads_what_the_stock_classes_answer():
    for head in ("token", "sequence"):
        model = models.tiny("mistral-sliding", head)
        sequences = models.prompts([3, 5, 5, 20], seed=9)
        for sequence, value in zip(sequences, oracle.Values(model)(sequences), strict=True):
            stock = model(torch.tensor([sequence])).logits
            assert stock.reshape(-1)[-1].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("arch", list(models.ARCHITECTURES))
@pytest.mark.parametrize("rule", ["reweight", "prune-keep", "reweight-mean"])
def test_every_architecture(arch, rule):
    head, kind = ("sequence", "reward-model") if arch == "gemma3" else ("token", "verl-critic")
    scorer = load_scorer(models.saved(arch, head), kind=kind)
    terminal = "critic" if kind == "reward-model" else "baseline"
    brute = oracle.Oracle(oracle.Values(models.tiny(arch, head)), terminal=terminal)
    assert_equal_brute_force(scorer, brute, GuidanceConfig(**RULES[rule]), *rows_of(arch))


@pytest.fixture(scope="module")
def critic():
    return load_scorer(models.saved("llama", "token"), kind="verl-critic")


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule(critic, rule):
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    config = GuidanceConfig(**RULES[rule])
    assert_equal_brute_force(critic, brute, config, *rows_of("llama"))


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("terminal", ["baseline", "critic", "reward"])
def test_every_terminal_rule(terminal, rule):
    reward = models.saved("llama", "sequence", seed=7) if terminal == "reward" else None
    scorer = load_scorer(
        models.saved("llama", "token"), kind="verl-critic", terminal=terminal, reward=reward
    )
    brute = oracle.Oracle(
        oracle.Values(models.tiny("llama", "token")),
        terminal=terminal,
        reward=oracle.Values(models.tiny("llama", "sequence", seed=7)),
    )
    prefixes, logits = rows_of("llama")
    logits[:, models.EOS] = logits.amax(-1) - 0.5  # EOS is a candidate of each row
    config = GuidanceConfig(**RULES[rule])
    assert_equal_brute_force(scorer, brute, config, prefixes, logits, [models.EOS])


def test_a_reward_model_reads_the_finished_response_with_its_own_conventions():
    # The critic drops BOS (EasyLM), the reward model keeps it.
    scorer = load_scorer(
        models.saved("llama", "token"),
        kind="ppo-critic",
        terminal="reward",
        reward=models.saved("llama", "sequence", seed=7),
    )
    brute = oracle.Oracle(
        oracle.Values(models.tiny("llama", "token"), drop_bos=models.BOS),
        terminal="reward",
        reward=oracle.Values(models.tiny("llama", "sequence", seed=7)),
    )
    policy = oracle.LogProbs(models.tiny("llama", "lm", seed=1))
    prefixes = models.prompts([4, 12, 30], seed=4, bos=True)
    logits = torch.stack([policy.logits(prefix) for prefix in prefixes])
    logits[:, models.EOS] = logits.amax(-1)
    config = GuidanceConfig(**REWEIGHT)
    assert_equal_brute_force(scorer, brute, config, prefixes, logits, [models.EOS])


@pytest.mark.parametrize("rule", ["reweight", "reweight-mean", "prune", "reweight-gate"])
def test_a_kl_term_against_a_reference(rule):
    scorer = load_scorer(
        models.saved("qwen2", "token"),
        kind="verl-critic",
        reference=models.saved("mistral", "lm", seed=5),
    )
    brute = oracle.Oracle(
        oracle.Values(models.tiny("qwen2", "token")),
        reference=oracle.LogProbs(models.tiny("mistral", "lm", seed=5)),
    )
    config = GuidanceConfig(**RULES[rule], kl_coef=0.4)
    assert_equal_brute_force(scorer, brute, config, *rows_of("llama"))


def test_a_kl_term_without_a_reference_is_refused(critic):
    prefixes, logits = rows_of("llama")
    with pytest.raises(ValueError, match="reference"):
        guide_rows(critic, logits, prefixes, GuidanceConfig(kl_coef=0.1), terminals=TERMINALS)


@pytest.fixture(scope="module")
def implicit():
    return load_scorer(
        models.saved("mistral", "lm", seed=11),
        kind="implicit",
        reference=models.saved("mistral", "lm", seed=12),
    )


IMPLICIT = oracle.Oracle(
    implicit=(
        oracle.LogProbs(models.tiny("mistral", "lm", seed=11)),
        oracle.LogProbs(models.tiny("mistral", "lm", seed=12)),
    )
)


@pytest.mark.parametrize(
    "rule", [{}, {"top_k": None}, {"top_k": None, "top_p": 0.9}, PRUNE, {"tail": "keep"}]
)
def test_an_implicit_reward_guides_terminals_too(implicit, rule):
    prefixes, logits = rows_of("llama")
    logits[:, models.EOS] = logits.amax(-1)
    config = GuidanceConfig(**rule)
    assert_equal_brute_force(implicit, IMPLICIT, config, prefixes, logits, [models.EOS])


def test_the_whole_vocabulary_is_for_implicit_rewards_only(critic):
    prefixes, logits = rows_of("llama")
    with pytest.raises(ValueError, match="top_k=None"):
        guide_rows(critic, logits, prefixes, GuidanceConfig(top_k=None), terminals=TERMINALS)


def test_top_k_beyond_the_vocabulary_is_refused(critic):
    prefixes, logits = rows_of("llama")
    config = GuidanceConfig(top_k=models.VOCAB + 1)
    with pytest.raises(ValueError, match=f"{models.VOCAB + 1}.*vocabulary"):
        guide_rows(critic, logits, prefixes, config, terminals=TERMINALS)


def test_tied_logits_are_cut_at_the_lower_ids(critic):
    prefixes, logits = rows_of("llama")
    logits = logits.round()  # a handful of distinct values
    config = GuidanceConfig(beta=0.7, top_k=6)
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    assert_equal_brute_force(critic, brute, config, prefixes, logits)


def test_masked_tokens_stay_masked(critic):
    prefixes, logits = rows_of("llama")
    masked = logits.topk(3).indices
    logits = logits.scatter(-1, masked, -torch.inf)
    for tail in ("mask", "keep"):
        config = GuidanceConfig(beta=5.0, top_k=4, tail=tail)
        guided = guide_rows(critic, logits, prefixes, config, terminals=TERMINALS)
        assert guided.gather(-1, masked).eq(-torch.inf).all()
        brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
        assert_equal_brute_force(critic, brute, config, prefixes, logits)


def test_a_row_with_fewer_live_tokens_than_top_k(critic):
    prefixes, logits = rows_of("llama")
    few = torch.full_like(logits, -torch.inf)
    few[:, [4, 9, models.EOS]] = logits[:, [4, 9, models.EOS]]
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    assert_equal_brute_force(critic, brute, GuidanceConfig(**REWEIGHT), prefixes, few)


def test_rows_with_different_configs_in_one_call(critic):
    prefixes, logits = rows_of("llama")
    configs = [
        GuidanceConfig(**RULES[rule])
        for rule in ("reweight", "prune", "reweight-gate", "reweight-top-p", "prune-keep")
    ]
    configs.append(GuidanceConfig(beta=0.0, tail="keep"))
    guided = guide_rows(critic, logits, prefixes, configs, terminals=TERMINALS)
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    for prefix, own, got, config in zip(prefixes, logits, guided, configs, strict=True):
        oracle.assert_row_equal(got, brute.row(prefix, own, config, TERMINALS))
    assert torch.equal(guided[-1], logits[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_precision_policy(critic, dtype):
    prefixes, logits = rows_of("llama")
    logits = logits.to(dtype)
    config = GuidanceConfig(beta=1.0, top_k=6, tail="keep")
    guided = guide_rows(critic, logits, prefixes, config, terminals=TERMINALS)
    assert guided.dtype == dtype
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    for prefix, own, got in zip(prefixes, logits, guided, strict=True):
        row = brute.row(prefix, own.float(), config, TERMINALS)
        oracle.assert_row_equal(got.float(), row, atol=0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_of_the_callers_changes_nothing(critic, dtype):
    prefixes, logits = rows_of("llama")
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    config = GuidanceConfig(**RULES["reweight-gate"])
    torch.set_default_dtype(dtype)
    try:
        guided = guide_rows(critic, logits, prefixes, config, terminals=TERMINALS)
    finally:
        torch.set_default_dtype(torch.float32)
    for prefix, own, got in zip(prefixes, logits, guided, strict=True):
        oracle.assert_row_equal(got, brute.row(prefix, own, config, TERMINALS))


def test_beta_zero_with_the_tail_kept_scores_nothing(critic):
    prefixes, logits = rows_of("llama")
    critic.stats.reset()
    config = GuidanceConfig(beta=0.0, tail="keep")
    guided = guide_rows(critic, logits, prefixes, config, terminals=TERMINALS)
    assert torch.equal(guided.view(torch.int32), logits.view(torch.int32))
    assert (critic.stats.rows_scored, critic.stats.forwards) == (0, 0)


def with_answer(scorer, monkeypatch, row, value):
    """Lets the scorer answer `value` for the first candidate of one row."""
    score = scorer.score

    def broken(prefixes, candidates):
        scores = score(prefixes, candidates)
        scores.values[row, 0] = value
        return scores

    monkeypatch.setattr(scorer, "score", broken)


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_not_finite_raises_unless_it_may_pass_through(monkeypatch, answer):
    prefixes, logits = rows_of("llama")
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")
    clean = guide_rows(scorer, logits, prefixes, GuidanceConfig(), terminals=())
    with_answer(scorer, monkeypatch, row=2, value=answer)
    with pytest.raises(ValueError, match=r"\[2\]"):
        guide_rows(scorer, logits, prefixes, GuidanceConfig(), terminals=())
    guided = guide_rows(
        scorer, logits, prefixes, GuidanceConfig(), terminals=(), on_error="passthrough"
    )
    assert torch.equal(guided[2], logits[2])
    assert torch.equal(guided[3:], clean[3:])
    assert scorer.stats.passthroughs == 1


def test_a_scorer_that_raises_passes_every_row_through_where_that_is_asked(monkeypatch):
    prefixes, logits = rows_of("llama")
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")

    def broken(prefixes, candidates):
        raise RuntimeError("the critic is gone")

    monkeypatch.setattr(scorer, "score", broken)
    with pytest.raises(RuntimeError, match="the critic is gone"):
        guide_rows(scorer, logits, prefixes, GuidanceConfig(), terminals=())
    guided = guide_rows(
        scorer, logits, prefixes, GuidanceConfig(), terminals=(), on_error="passthrough"
    )
    assert torch.equal(guided, logits)
    assert scorer.stats.passthroughs == len(prefixes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_critic_is_close_and_answers_in_float32(dtype):
    prefixes = models.prompts(LENGTHS, seed=3)
    tokens = torch.arange(3, 11).repeat(len(prefixes), 1)
    values = oracle.Values(models.tiny("llama", "token"))
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic", dtype=dtype)
    scores = scorer.score(prefixes, tokens)
    assert scores.values.dtype == scores.baseline.dtype == torch.float32
    exact = torch.tensor([values.after(prefix, range(3, 11)) for prefix in prefixes])
    # A few percent of the values' spread, after two layers.
    assert (scores.values - exact).abs().mean() < 0.05 * exact.std()
