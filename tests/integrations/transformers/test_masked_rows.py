"""A row to which other processors leave no token is never sampled in silence."""

import pytest
import torch
from transformers import LogitsProcessor

from guided_decode import GuidanceConfig
from guided_decode.integrations.transformers import (
    GuidedDecoding,
    TrunkLookahead,
    ValueGuidedLogitsProcessor,
)
from tests import models, trunk_heads

CONFIG = GuidanceConfig(beta=1.5, top_k=6)
PROMPTS = models.prompts([7, 3, 9], seed=2)
WIDTH = 9
LOOPS = [GuidedDecoding, TrunkLookahead]


class MaskAll(LogitsProcessor):
    """Leaves a row no token, from a length on."""

    def __init__(self, row, length):
        self.row, self.length = row, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            scores = scores.clone()
            scores[self.row] = -torch.inf
        return scores


def generate(loop, mask, config=CONFIG, **options):
    policy, scorer = trunk_heads.policy(), trunk_heads.scorer()
    options = {"logits_processor": [mask], "max_new_tokens": 8} | options
    out = trunk_heads.generate(policy, PROMPTS, scorer, config, loop=loop, **options)
    return out, scorer


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("length", [WIDTH, WIDTH + 3])
def test_it_is_refused_in_words(loop, length, sample):
    with pytest.raises(ValueError, match=r"rows \[1\] came with every logit at -inf"):
        generate(loop, MaskAll(1, length), do_sample=sample, eos_token_id=None)


def test_it_is_refused_by_the_bare_processor_behind_what_masks():
    scorer = trunk_heads.scorer()
    processor = ValueGuidedLogitsProcessor(scorer, CONFIG)
    with pytest.raises(ValueError, match=r"rows \[0\] came with every logit at -inf"):
        trunk_heads.policy().generate(
            torch.tensor(PROMPTS[:1]),
            logits_processor=[MaskAll(0, 0), processor],
            max_new_tokens=2,
        )


@pytest.mark.parametrize("loop", LOOPS)
def test_with_passthrough_the_others_go_on(loop):
    def careful(scorer, config):
        return loop(scorer, config, on_error="passthrough")

    out, scorer = generate(careful, MaskAll(1, WIDTH), eos_token_id=None)
    plain, _ = generate(loop, MaskAll(1, 10**6), eos_token_id=None)
    assert torch.equal(out.sequences[[0, 2]], plain.sequences[[0, 2]])
    assert (out.scores[0][1] == -torch.inf).all()
    assert scorer.stats.passthroughs == len(out.scores)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_finished_row_may_have_none(loop):
    free, _ = generate(loop, MaskAll(1, 10**6), eos_token_id=None)
    end = int(free.sequences[1, WIDTH])  # row 1 ends at its first token
    assert end not in free.sequences[[0, 2], WIDTH:]
    out, _ = generate(loop, MaskAll(1, WIDTH + 1), eos_token_id=[end])
    assert torch.equal(out.sequences[[0, 2]], free.sequences[[0, 2]])
