"""Which tokens are a row's prompt, its answer, or padding: one processor, call after call."""

import copy
import threading

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import GuidedDecoding, ValueGuidedLogitsProcessor
from tests import models

CONFIG = GuidanceConfig(beta=1.5, top_k=6)
PAD, EOS = 0, 2


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic", cache_tokens=2048)


@pytest.fixture(scope="module")
def policy():
    return models.tiny("llama", "lm", seed=1)


def processor(scorer, **kwargs):
    return ValueGuidedLogitsProcessor(
        scorer, CONFIG, **{"pad_token_id": PAD, "eos_token_id": EOS, **kwargs}
    )


def logits(rows):
    return torch.randn(rows, 101, generator=torch.Generator().manual_seed(rows))


def histories(processor):
    return [handle.tokens.tolist() for handle in processor._now.handles]


def test_a_single_padded_row_is_guided_as_in_a_batch(scorer):
    ids, row = torch.tensor([[PAD, PAD, 17, 18, 19]]), logits(1)
    alone = processor(scorer)(ids, row)
    together = processor(scorer)(ids.repeat(2, 1), row.repeat(2, 1))
    torch.testing.assert_close(alone[0], together[0])


def test_a_single_leading_bos_is_no_padding_and_more_of_it_is_refused(scorer):
    bos = scorer.bos_token_id
    one = processor(scorer, pad_token_id=bos)
    one(torch.tensor([[bos, 5, 6]]), logits(1))
    assert histories(one) == [[bos, 5, 6]]
    with pytest.raises(ValueError, match="attention_mask"):
        processor(scorer, pad_token_id=bos)(torch.tensor([[bos, bos, 5]]), logits(1))


def test_ids_that_continue_an_earlier_step_are_a_new_generation(scorer):
    one = processor(scorer)
    for ids in ([5, 6], [5, 6, 7], [5, 6, 8, 9]):
        one(torch.tensor([ids]), logits(1))
    assert histories(one) == [[5, 6, 8, 9]]


def test_the_next_turn_of_a_batch_is_guided_in_every_row(scorer):
    one, rows = processor(scorer), logits(2)
    for ids in ([[5, 6], [7, 8]], [[5, 6, EOS], [7, 8, 9]]):
        one(torch.tensor(ids), rows)
    last = torch.tensor([[5, 6, EOS, 10], [7, 8, 9, 10]])
    torch.testing.assert_close(one(last, rows), processor(scorer)(last, rows))


def test_a_mask_of_other_prompts_is_refused_and_a_new_one_taken(scorer):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    one = processor(scorer, attention_mask=mask)
    one(torch.tensor([[PAD, PAD, 5, 6], [5, 6, 7, 8]]), logits(2))
    other = torch.tensor([[9, 10, 11, 12], [PAD, PAD, 13, 14]])
    with pytest.raises(ValueError, match="belongs to other prompts"):
        one(other, logits(2))
    one.attention_mask = mask.flip(0)
    one(other, logits(2))
    assert histories(one) == [[9, 10, 11, 12], [13, 14]]


def test_beams_stay_within_their_prompt_though_their_ids_are_equal(scorer):
    one = processor(
        scorer, num_beams=2, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]), pad_token_id=None
    )
    ids = torch.tensor([[1, 5, 6]] * 4)
    one(ids, logits(4))
    ids = torch.cat([ids, torch.tensor([[10], [11], [10], [11]])], 1)
    one(ids, logits(4))
    one(torch.cat([ids[[1, 0, 3, 2]], torch.full((4, 1), 12)], 1), logits(4))
    assert histories(one) == [[1, 5, 6, 11, 12], [1, 5, 6, 10, 12], [5, 6, 11, 12], [5, 6, 10, 12]]


def test_beam_search_goes_on_when_all_its_running_beams_have_ended(scorer, policy):
    prompt = torch.tensor([[5, 6, 7]])
    out = policy.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=2,
        max_new_tokens=6,
        eos_token_id=EOS,
        pad_token_id=PAD,
        early_stopping="never",
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, ids: [10] if len(ids) == 3 else [EOS],
        custom_generate=GuidedDecoding(scorer, GuidanceConfig(top_k=8)),
    )
    assert out[0].tolist()[:5] == [5, 6, 7, 10, EOS]


def test_a_streamer_with_beams_is_refused(scorer, policy):
    class Streamer:
        def put(self, value):
            raise AssertionError

    guided = GuidedDecoding(scorer, CONFIG, streamer=Streamer())
    with pytest.raises(ValueError, match="streamer"):
        policy.generate(torch.tensor([[5, 6]]), num_beams=2, max_new_tokens=2, pad_token_id=PAD,
                        custom_generate=guided)  # fmt: skip


def test_a_reset_and_a_copy_leave_another_threads_generation_alone(scorer):
    shared = processor(scorer)
    shared(torch.tensor([[5, 6, 7]]), logits(1))
    other = threading.Thread(target=shared.reset)
    other.start()
    other.join()
    assert shared._now.width == 3
    assert copy.deepcopy(shared)._now.width == 0
    shared.reset()
    assert shared._now.width == 0
