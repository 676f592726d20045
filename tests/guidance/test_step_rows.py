"""Rows of one step that differ: in their settings, in what ends them, in what can be scored."""

import numpy as np
import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.guidance import rule
from guided_decode.guidance.candidates import choose_candidates, select_candidates
from guided_decode.guidance.step import guide_rows
from tests import models, oracle

LENGTHS = [3, 17, 1, 40, 8, 25]
CONFIGS = [
    GuidanceConfig(beta=1.7, top_k=8),
    GuidanceConfig(beta=0.5, top_k=3, top_p=0.6, tail="keep"),
    GuidanceConfig(rule="prune", margin=0.8, top_k=16),
    GuidanceConfig(beta=-1.0, top_k=1, tail="keep"),
    GuidanceConfig(beta=0.0, tail="keep"),
    GuidanceConfig(beta=2.0, top_k=12, gate=0.3),
]


def critic(**options):
    return load_scorer(models.saved("llama", "token"), kind="verl-critic", **options)


def step():
    policy = oracle.LogProbs(models.tiny("llama", "lm", seed=1))
    prefixes = models.prompts(LENGTHS, seed=3)
    return prefixes, torch.stack([policy.logits(prefix) for prefix in prefixes])


def test_a_selection_of_each_rows_own_equals_the_rows_alone():
    logits = torch.randn(6, 101, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    top_k, top_p = [1, 8, 101, 3, 40, None], [1.0, 0.5, 0.9, 0.1, 1.0, 0.7]
    configs = [GuidanceConfig(top_k=k, top_p=p) for k, p in zip(top_k, top_p, strict=True)]
    together, gated = choose_candidates(logits, configs)
    assert gated is None
    for row, k, p, got in zip(logits, top_k, top_p, together, strict=True):
        alone = select_candidates(row[None], k, p)[0]
        assert got[got >= 0].tolist() == alone[alone >= 0].tolist()


def test_terminals_of_each_row():
    prefixes, logits = step()
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    terminals = [[], [models.EOS], list(range(30, 60)), [5], range(40, 44), {7, 8, 9}]
    guided = guide_rows(critic(), logits, prefixes, CONFIGS, terminals=terminals)
    for i, got in enumerate(guided):
        oracle.assert_row_equal(got, brute.row(prefixes[i], logits[i], CONFIGS[i], terminals[i]))


def test_terminals_in_an_array():
    prefixes, logits = step()
    listed, array = (
        guide_rows(critic(), logits, prefixes, CONFIGS, terminals=terminals)
        for terminals in ([models.EOS, 5], np.array([models.EOS, 5]))
    )
    assert torch.equal(listed, array)


def test_terminals_for_another_number_of_rows_are_refused():
    prefixes, logits = step()
    with pytest.raises(ValueError, match="terminals came for 2 rows with logits of 6"):
        guide_rows(critic(), logits, prefixes, CONFIGS, terminals=[[1], [2]])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda row: row * (models.POSITIONS // len(row) + 1), "positions"),
        (lambda row: [*row, models.VOCAB], "outside the vocabulary"),
        (lambda row: [], "empty prefix"),
    ],
)
def test_a_refused_row_passes_through_alone(spoil, reason, caplog):
    prefixes, logits = step()
    expected = guide_rows(critic(), logits, prefixes, CONFIGS)
    prefixes[2] = spoil(prefixes[2])
    scorer = critic()
    guided = guide_rows(scorer, logits, prefixes, CONFIGS, on_error="passthrough")
    assert torch.equal(guided[2], logits[2])
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(guided[others], expected[others], rtol=0, atol=1e-5)
    assert scorer.stats.passthroughs == 1
    assert reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        guide_rows(critic(), logits, prefixes, CONFIGS)


def test_a_candidate_that_the_critic_does_not_know_passes_its_row_through():
    prefixes, logits = step()
    expected = guide_rows(critic(), logits, prefixes, CONFIGS)
    wider = torch.cat([logits, torch.full((len(logits), 11), -50.0)], -1)
    wider[1, models.VOCAB + 4] = 60.0
    scorer = critic()
    guided = guide_rows(scorer, wider, prefixes, CONFIGS, on_error="passthrough")
    assert torch.equal(guided[1], wider[1])
    others = [0, 2, 3, 5]
    torch.testing.assert_close(guided[others, : models.VOCAB], expected[others], rtol=0, atol=1e-4)
    assert scorer.stats.passthroughs == 1
    with pytest.raises(ValueError, match=r"rows \[1\]: the likeliest token is outside"):
        guide_rows(critic(), wider, prefixes, CONFIGS)


@pytest.mark.parametrize(
    "config",
    [
        GuidanceConfig(top_k=5, kl_coef=0.5, gate=1e-6),
        GuidanceConfig(top_k=5, kl_coef=0.5, beta=0.0),
        GuidanceConfig(top_k=5, kl_coef=0.5, beta=0.0, tail="keep"),
    ],
    ids=["gated", "beta 0", "untouched"],
)
@pytest.mark.parametrize("on_error", ["raise", "passthrough"])
def test_a_row_with_a_kl_term_that_is_not_scored_troubles_nobody(config, on_error):
    prefixes, logits = step()
    scorer = critic(reference=models.saved("llama", "lm", seed=5))
    configs = [config, *CONFIGS[1:]]
    guided = guide_rows(scorer, logits, prefixes, configs, on_error=on_error)
    expected = guide_rows(critic(), logits, prefixes, CONFIGS)
    torch.testing.assert_close(guided[1:], expected[1:], rtol=0, atol=1e-5)
    kept = select_candidates(logits[:1], 5)[0] if config.tail == "mask" else slice(None)
    assert torch.equal(guided[0, kept], logits[0, kept])
    assert scorer.stats.passthroughs == 0


def test_a_row_with_a_kl_term_that_is_refused_passes_through_alone():
    prefixes, logits = step()
    prefixes[0] = []
    scorer = critic(reference=models.saved("llama", "lm", seed=5))
    configs = [GuidanceConfig(top_k=5, kl_coef=0.5), *CONFIGS[1:]]
    guided = guide_rows(scorer, logits, prefixes, configs, on_error="passthrough")
    assert torch.equal(guided[0], logits[0])
    assert scorer.stats.passthroughs == 1


def test_tensors_that_kernels_take_are_aligned_whatever_the_rows():
    scorer = critic()
    for rows in (1, 2, 3, 5):
        candidates = torch.arange(3, 6).expand(rows, 3)
        scores = scorer.score(models.prompts(LENGTHS)[:rows], candidates)
        rules = rule._rules(CONFIGS[:rows], torch.device("cpu"))
        given = [*scores, *rules[:4]]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in given)
        assert all(tensor.stride(-1) == 1 for tensor in given)


def all_masked():
    prefixes, logits = step()
    logits[[1, 3]] = -torch.inf
    return prefixes, logits


@pytest.mark.parametrize("top_k", [5, None], ids=["critic", "vocabulary"])
def test_a_row_without_a_token_left_is_refused_in_words(top_k):
    prefixes, logits = all_masked()
    config = GuidanceConfig(top_k=top_k)
    scorer = critic()
    if top_k is None:
        reference = models.saved("mistral", "lm", seed=5)
        scorer = load_scorer(
            models.saved("mistral", "lm", seed=6), kind="implicit", reference=reference
        )
    with pytest.raises(ValueError, match=r"rows \[1, 3\] came with every logit at -inf.*processor"):
        guide_rows(scorer, logits, prefixes, config)


def test_a_row_without_a_token_left_passes_through_alone(caplog):
    prefixes, logits = all_masked()
    scorer, config = critic(), GuidanceConfig(top_k=5)
    guided = guide_rows(scorer, logits, prefixes, config, on_error="passthrough")
    assert (guided[[1, 3]] == -torch.inf).all()
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    for i in (0, 2, 4, 5):
        oracle.assert_row_equal(guided[i], brute.row(prefixes[i], logits[i], config))
    assert scorer.stats.passthroughs == 2
    assert "every logit at -inf" in caplog.text


def test_a_row_that_is_not_guided_may_come_without_a_token():
    prefixes, logits = all_masked()
    configs = [GuidanceConfig(top_k=5)] * 6
    configs[1] = configs[3] = GuidanceConfig(beta=0.0, tail="keep")
    guided = guide_rows(critic(), logits, prefixes, configs)
    assert torch.equal(guided[[1, 3]], logits[[1, 3]])


def test_ids_beyond_the_scorers_vocabulary_are_as_if_forbidden():
    """A policy may be padded further than its scorer, whose whole vocabulary is asked for."""
    scorer = load_scorer(
        models.saved("llama", "lm", seed=2), "implicit", reference=models.saved("llama", "lm")
    )
    configs = [GuidanceConfig(top_k=None), GuidanceConfig(top_k=None, top_p=0.9, tail="keep"),
               GuidanceConfig(top_k=5), GuidanceConfig(top_k=9, gate=0.4),
               GuidanceConfig(top_k=3, rule="prune", margin=0.5, tail="keep"),
               GuidanceConfig(beta=0.0, tail="keep")]  # fmt: skip
    prefixes, logits = step()
    padded = torch.cat([logits, torch.linspace(-30, -3, 27).expand(len(logits), -1)], -1)
    guided = guide_rows(scorer, padded, prefixes, configs)
    expected = guide_rows(scorer, logits, prefixes, configs)
    torch.testing.assert_close(guided[:, : models.VOCAB], expected, rtol=0, atol=1e-4)
    for config, row, own in zip(configs, guided[:, models.VOCAB :], padded, strict=True):
        beyond = own[models.VOCAB :]
        assert torch.equal(row, beyond if config.tail == "keep" else beyond - torch.inf)
    assert scorer.stats.passthroughs == 0


class Breaking:
    """A scorer that refuses one row, and breaks on the others."""

    def __init__(self, scorer):
        self._scorer = scorer

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def score(self, prefixes, candidates):
        if len(prefixes) == 6:
            raise ValueError("row 2 is refused")
        raise RuntimeError("the scorer broke")

    def refusal(self, prefix, candidates):
        return "it is refused" if len(prefix) == len(step()[0][2]) else None


def test_rows_pass_through_whole_where_one_is_refused_and_the_others_break():
    prefixes, logits = step()
    scorer = Breaking(critic())
    guided = guide_rows(scorer, logits, prefixes, GuidanceConfig(top_k=5), on_error="passthrough")
    assert torch.equal(guided, logits)
    assert scorer.stats.passthroughs == 6


def test_a_row_whose_likeliest_token_is_not_the_scorers_is_counted_though_nothing_scores_it():
    prefixes, logits = step()
    wider = torch.cat([logits, torch.full((len(logits), 5), -50.0)], -1)
    wider[1, -1] = 80.0
    config = GuidanceConfig(beta=0.0, top_k=5)
    scorer = critic()
    guided = guide_rows(scorer, wider, prefixes, config, on_error="passthrough")
    assert torch.equal(guided[1], wider[1])
    assert scorer.stats.passthroughs == 1
    with pytest.raises(ValueError, match=r"rows \[1\]: the likeliest token is outside"):
        guide_rows(critic(), wider, prefixes, config)
