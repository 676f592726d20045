"""What a step tells whoever observes it: what it read, and what it handed on."""

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.guidance.rule import advantages
from guided_decode.guidance.step import guide_rows
from tests import models, oracle

LENGTHS = [3, 17, 40]
CONFIGS = [
    GuidanceConfig(beta=1.7, top_k=8),
    GuidanceConfig(beta=0.5, top_k=3, top_p=0.6, tail="keep", baseline="mean"),
    GuidanceConfig(rule="prune", margin=0.8, top_k=16),
    GuidanceConfig(beta=0.7, top_k=6, kl_coef=0.4),
]


def step():
    policy = oracle.LogProbs(models.tiny("llama", "lm", seed=1))
    prefixes = models.prompts(LENGTHS, seed=3)
    return prefixes, torch.stack([policy.logits(prefix) for prefix in prefixes])


def critic():
    return load_scorer(
        models.saved("llama", "token"),
        kind="verl-critic",
        reference=models.saved("llama", "lm", seed=2),
    )


def observed(config, logits, prefixes, **options):
    seen = []
    guided = guide_rows(critic(), logits, prefixes, config, observe=seen.append, **options)
    (one,) = seen
    assert torch.equal(one.guided, guided)
    return one


@pytest.mark.parametrize("config", CONFIGS)
def test_advantages_are_those_of_the_definition(config):
    prefixes, logits = step()
    brute = oracle.Oracle(
        oracle.Values(models.tiny("llama", "token")),
        reference=oracle.LogProbs(models.tiny("llama", "lm", seed=2)),
    )
    # The likeliest token of the first row would end it.
    ends = [int(logits[0].argmax())]
    seen = observed(config, logits, prefixes, terminals=ends)
    found = advantages(seen.scores, [config] * len(logits), seen.scored, seen.log_ratio)
    for row, prefix in enumerate(prefixes):
        expected = brute.row(prefix, logits[row], config, ends)
        chosen = seen.candidates[row][seen.candidates[row] >= 0].tolist()
        assert chosen == expected.candidates
        free = [token for token in chosen if token not in ends]
        wanted = brute.advantages(
            prefix, free, oracle.log_softmax(logits[row].tolist()), config, ends
        )
        for column, token in enumerate(chosen):
            assert bool(seen.scored[row, column]) == (token not in ends)
            assert float(found[row, column]) == pytest.approx(wanted.get(token, 0.0), abs=1e-4)


def test_a_gated_row_was_not_scored():
    prefixes, logits = step()
    seen = observed(GuidanceConfig(top_k=4, gate=1e-6), logits, prefixes)
    assert not seen.scored.any()
    assert seen.scores.values.isnan().all()
    assert seen.scores.baseline.isnan().all()


def test_guidance_that_changes_nothing_tells_its_candidates_and_asks_no_scorer():
    prefixes, logits = step()
    scorer, seen = critic(), []
    config = GuidanceConfig(beta=0.0, top_k=5, tail="keep")
    before = scorer.stats.rows_scored
    guided = guide_rows(scorer, logits, prefixes, config, observe=seen.append)
    assert torch.equal(guided, logits)
    assert seen[0].candidates.tolist() == logits.topk(5).indices.tolist()
    assert scorer.stats.rows_scored == before
