"""`scorer.score` answers from its arguments alone, for every family, and refuses what it cannot."""

import re

import numpy as np
import pytest
import torch

from guided_decode import PrefixHandle, load_scorer
from tests import models, oracle

TOKENS = [3, 50, 99, 7]


def critic(**options):
    return load_scorer(models.saved("llama", "token"), kind="verl-critic", **options)


VALUES = oracle.Values(models.tiny("llama", "token"))


def assert_scores(scorer, prefixes, rows, values=VALUES, atol=1e-4):
    """`prefixes` as ids or handles, `rows` as lists of candidates."""
    width = max(1, *(len(row) for row in rows))
    candidates = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    scores = scorer.score(prefixes, candidates)
    assert scores.values.shape == candidates.shape
    assert scores.baseline.shape == (len(rows),)
    assert scores.values.dtype == scores.baseline.dtype == torch.float32
    plain = [
        list(prefix.tokens) if isinstance(prefix, PrefixHandle) else list(prefix)
        for prefix in prefixes
    ]
    expected = torch.full(candidates.shape, torch.nan)
    for number, (prefix, row) in enumerate(zip(plain, rows, strict=True)):
        expected[number, : len(row)] = torch.tensor(values.after(prefix, row))
    close = {"rtol": 0, "atol": atol, "equal_nan": True}
    torch.testing.assert_close(scores.values.cpu(), expected, **close)
    torch.testing.assert_close(scores.baseline.cpu(), torch.tensor(values(plain)), **close)


# Families and their conventions.


@pytest.mark.parametrize("arch", list(models.ARCHITECTURES))
@pytest.mark.parametrize("head", ["token", "sequence"])
def test_every_architecture_and_head(arch, head):
    if (arch, head) == ("gemma3", "token"):
        head = "sequence"
    kind = {"token": "verl-critic", "sequence": "reward-model"}[head]
    scorer = load_scorer(models.saved(arch, head), kind=kind)
    values = oracle.Values(models.tiny(arch, head))
    prefixes = models.prompts([1, 2, 30, 11, 64], seed=5)
    assert_scores(scorer, prefixes, [TOKENS] * 5, values)
    longer = [[*prefix, 50] for prefix in prefixes]
    assert_scores(scorer, longer, [TOKENS[:2]] * 5, values)


def test_a_reward_model_is_read_at_the_last_token_even_if_that_is_the_pad_id():
    scorer = load_scorer(models.saved("llama", "sequence"), kind="reward-model")
    values = oracle.Values(models.tiny("llama", "sequence"))
    assert_scores(scorer, [[5, 6, models.PAD], [9, 8]], [[models.PAD, 4], [models.PAD]], values)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gemma"])
def test_a_model_that_was_loaded_by_the_caller(arch):
    model = models.tiny(arch, "token")
    scorer = load_scorer(model, kind="verl-critic")
    assert_scores(scorer, models.prompts([9, 2]), [TOKENS] * 2, oracle.Values(model))
    # The caller's own module goes on answering as before.
    ids = torch.tensor(models.prompts([12]))
    again = models.tiny.__wrapped__(arch, "token")
    torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=0, atol=1e-6)


def test_a_trl_value_head_has_its_bias():
    scorer = load_scorer(models.saved_value_head("trl"), kind="value-head")
    values = oracle.Values(
        models.tiny("llama", "token"), transform=lambda output: output[..., 0] + 0.75
    )
    assert_scores(scorer, models.prompts([5, 20]), [TOKENS] * 2, values)


def test_an_openrlhf_value_head():
    scorer = load_scorer(models.saved_value_head("openrlhf"), kind="value-head")
    assert_scores(scorer, models.prompts([5, 20]), [TOKENS] * 2)


def test_a_classifier_of_three_labels_is_the_probability_of_class_one():
    scorer = load_scorer(models.saved("qwen2", "sequence", labels=3), kind="classifier")
    values = oracle.Values(
        models.tiny("qwen2", "sequence", labels=3),
        transform=lambda output: output.softmax(-1)[..., 1],
    )
    assert_scores(scorer, models.prompts([5, 20]), [TOKENS] * 2, values)


def test_a_classifier_of_one_label_is_a_sigmoid():
    scorer = load_scorer(models.saved("qwen2", "sequence"), kind="classifier")
    values = oracle.Values(
        models.tiny("qwen2", "sequence"), transform=lambda output: output[..., 0].sigmoid()
    )
    assert_scores(scorer, models.prompts([5, 20]), [TOKENS] * 2, values)


def test_a_ppo_critic_reads_no_bos_and_verl_reads_it():
    with_bos = models.prompts([6, 15], bos=True)
    dropping = load_scorer(models.saved("llama", "token"), kind="ppo-critic")
    without = oracle.Values(models.tiny("llama", "token"), drop_bos=models.BOS)
    assert_scores(dropping, with_bos, [TOKENS] * 2, without)
    assert_scores(critic(), with_bos, [TOKENS] * 2)
    # Otherwise the test above could not fail.
    assert abs(without(with_bos)[0] - VALUES(with_bos)[0]) > 0.01


def test_only_one_leading_bos_is_dropped():
    scorer = load_scorer(models.saved("llama", "token"), kind="ppo-critic")
    without = oracle.Values(models.tiny("llama", "token"), drop_bos=models.BOS)
    rows = [[models.BOS, models.BOS, 9, 8], [7, models.BOS, 9], [9, 8]]
    assert_scores(scorer, rows, [TOKENS] * 3, without)


def test_a_prefix_that_is_only_bos_keeps_it():
    scorer = load_scorer(models.saved("llama", "token"), kind="ppo-critic")
    without = oracle.Values(models.tiny("llama", "token"), drop_bos=models.BOS)
    handle = PrefixHandle([models.BOS])
    assert_scores(scorer, [[models.BOS], handle], [TOKENS] * 2, without)
    handle.append(50)
    assert_scores(scorer, [[models.BOS, 50], handle], [TOKENS] * 2, without)
    assert without([[models.BOS]]) == VALUES([[models.BOS]])


def test_bos_can_be_overridden():
    scorer = load_scorer(models.saved("llama", "token"), kind="ppo-critic", bos="keep")
    assert_scores(scorer, models.prompts([6], bos=True), [TOKENS])


# Stateless: cached or not, in any order, whole or in parts.


def test_the_answer_unpacks():
    values, baseline = critic().score([[5, 6]], torch.tensor([[7]]))
    assert values.shape == (1, 1)
    assert baseline.shape == (1,)


def test_asking_twice_gives_the_same_bits():
    scorer = critic()
    prefixes, tokens = models.prompts([4, 33]), torch.tensor([TOKENS] * 2)
    first, second = scorer.score(prefixes, tokens), scorer.score(prefixes, tokens)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.baseline, second.baseline)


def test_what_the_caller_does_to_its_arguments_and_answers_changes_nothing():
    scorer = critic()
    prefix, tokens = [5, 6, 7, 8], torch.tensor([TOKENS])
    scores = scorer.score([prefix], tokens)
    prefix[1] = 60
    tokens[0, 0] = 61
    scores.values.zero_()
    scores.baseline.zero_()
    assert_scores(scorer, [[5, 6, 7, 8], [5, 60, 7, 8]], [TOKENS, [61, 50]])


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, PrefixHandle])
def test_a_prefix_may_come_in_any_form(form):
    scorer = critic()
    candidates = torch.tensor([TOKENS] * 2)
    rows = models.prompts([9, 3])
    scores = scorer.score([form(row) for row in rows], candidates)
    expected = torch.tensor([VALUES.after(row, TOKENS) for row in rows])
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-4)


def test_forks_share_and_do_not_disturb_each_other():
    scorer = critic()
    stem = models.prompts([20])[0]
    forks = [[*stem, token] for token in (9, 10, 9)] + [stem[:10], stem, [*stem, 9, 9, 9]]
    for _ in range(2):
        assert_scores(scorer, forks, [TOKENS] * len(forks))


def test_a_batch_may_hold_a_prefix_that_another_row_extends():
    scorer = critic()
    row = models.prompts([24])[0]
    assert_scores(scorer, [row[:n] for n in (24, 3, 12, 1, 23, 24)], [TOKENS] * 6)


def test_a_candidate_of_one_row_may_be_the_prefix_of_another():
    scorer = critic()
    stem = [5, 6, 7]
    assert_scores(scorer, [stem, [*stem, 50], [*stem, 50, 99]], [TOKENS, TOKENS, TOKENS])
    fresh = critic()
    assert_scores(fresh, [[*stem, 50, 99], [*stem, 50], stem], [TOKENS, TOKENS, TOKENS])


def test_ragged_empty_and_repeated_candidates():
    scorer = critic()
    rows = models.prompts([4, 9, 2, 6])
    assert_scores(scorer, rows, [[3], [], [50, 50, 3, 50], [99, 7]])


def test_padding_may_stand_between_candidates():
    scores = critic().score([[5, 6, 7]], torch.tensor([[50, -1, 99]]))
    expected = VALUES.after([5, 6, 7], [50, 99])
    assert scores.values[0, [0, 2]].tolist() == pytest.approx(expected, abs=1e-4)
    assert scores.values[0, 1].isnan()


def test_no_rows_are_no_work():
    scorer = critic()
    scores = scorer.score([], torch.empty(0, 4, dtype=torch.int64))
    assert scores.values.shape == (0, 4)
    assert scores.baseline.shape == (0,)
    assert scorer.stats.forwards == 0


def test_rows_without_any_candidates_have_a_baseline():
    rows = models.prompts([5, 9])
    scores = critic().score(rows, torch.empty(2, 0, dtype=torch.int64))
    assert scores.values.shape == (2, 0)
    assert scores.baseline.tolist() == pytest.approx(VALUES(rows), abs=1e-4)


@pytest.mark.parametrize("loaded_inside", [True, False])
def test_inference_mode_may_come_and_go(loaded_inside):
    with torch.inference_mode(loaded_inside):
        scorer = critic()
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            # Long enough that whatever the scorer keeps has to grow inside, then outside.
            assert_scores(scorer, models.prompts([70, 150], seed=2 + inside), [TOKENS] * 2)


def test_a_default_dtype_of_the_callers_changes_no_score():
    torch.set_default_dtype(torch.float64)
    try:
        scorer = critic()
        scores = scorer.score(models.prompts([9]), torch.tensor([TOKENS]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.values.dtype == scores.baseline.dtype == torch.float32
    assert scores.values[0].tolist() == pytest.approx(
        VALUES.after(models.prompts([9])[0], TOKENS), abs=1e-4
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("limit", [1, 7, 64])
def test_a_bound_on_one_forward_changes_no_score(arch, limit):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            seen.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) else None
        )
    )
    scorer = load_scorer(models.saved(arch, "token"), kind="verl-critic", max_forward_tokens=limit)
    seen.clear()
    prefixes = models.prompts([30, 5, 13], seed=8)
    try:
        scores = scorer.score(prefixes, torch.tensor([TOKENS] * 3))
    finally:
        hook.remove()
    assert max(seen) <= limit
    assert sum(seen) == 30 + 5 + 13 + 3 * len(TOKENS)
    values = oracle.Values(models.tiny(arch, "token"))
    expected = torch.tensor([values.after(prefix, TOKENS) for prefix in prefixes])
    torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-4)


def test_a_batch_that_is_larger_than_the_pool_is_scored_in_parts():
    prefixes = models.prompts([40, 41, 42, 43, 44, 45, 46, 47], seed=6)
    scorer = critic(cache_tokens=47 + len(TOKENS) + 4)
    for _ in range(2):
        assert_scores(scorer, prefixes, [TOKENS] * 8)
        assert scorer.cache.pinned == 0
        scorer.cache.check()
    assert scorer.stats.evictions > 0


def test_a_candidate_found_as_another_prefix_is_not_evicted_by_a_later_row_of_its_batch():
    scorer = critic(cache_tokens=4)
    assert_scores(scorer, [[2, 6], [2, 7]], [[], []])  # 2, with children 6 and 7
    # Row 0 reads the cached 6; row 1 needs two slots where one is free.
    assert_scores(scorer, [[2], [8, 9]], [[6], []])


def test_a_long_prefix_that_grew_token_by_token_and_in_chunks():
    model = models.tiny("gemma2", "token", max_position_embeddings=2048)
    scorer = load_scorer(model, kind="verl-critic", max_forward_tokens=300)
    values = oracle.Values(model)
    handle = PrefixHandle(models.prompts([700], seed=3)[0])
    for token in TOKENS[:3]:
        assert_scores(scorer, [handle], [TOKENS], values)
        handle.append(token)
    handle.extend(models.prompts([350], seed=4)[0])
    assert_scores(scorer, [handle], [TOKENS], values)


def test_a_cleared_cache_answers_again():
    scorer = critic()
    handle = PrefixHandle(models.prompts([12])[0])
    assert_scores(scorer, [handle], [TOKENS])
    scorer.cache.clear()
    assert scorer.cache.cached_tokens == 0
    assert scorer.cache.free_slots == scorer.cache.capacity
    assert_scores(scorer, [handle], [TOKENS])


# Handles.


def test_a_handle_grows_by_tokens():
    scorer = critic()
    handle = PrefixHandle([5, 6])
    for token in (50, 60, 99):
        assert_scores(scorer, [handle], [TOKENS])
        handle.append(token)
    handle.extend([8, 9, 10])
    assert list(handle.tokens) == [5, 6, 50, 60, 99, 8, 9, 10]
    assert len(handle) == 8
    assert_scores(scorer, [handle], [TOKENS])


def test_sync_appends_what_is_new_and_resets_on_any_other_change():
    scorer = critic()
    handle = PrefixHandle([5, 6, 7])
    for tokens in ([5, 6, 7, 50, 9], [5, 6], [5, 6, 99, 3], [8], [8, 6, 99, 3], [8, 6, 99, 3]):
        handle.sync(tokens)
        assert list(handle.tokens) == tokens
        assert_scores(scorer, [handle], [TOKENS])


def test_a_reset_to_the_same_length_is_not_mistaken_for_the_old_prefix():
    scorer = critic()
    handle = PrefixHandle([5, 6, 7])
    assert_scores(scorer, [handle], [TOKENS])
    handle.sync([9, 6, 7])
    assert_scores(scorer, [handle], [TOKENS])


def test_one_handle_may_serve_several_rows_and_several_scorers():
    first = critic()
    second = load_scorer(models.saved("qwen2", "token"), kind="ppo-critic")
    other = oracle.Values(models.tiny("qwen2", "token"), drop_bos=models.BOS)
    handle = PrefixHandle([models.BOS, 6, 7])
    for token in (50, 3, 20):
        assert_scores(first, [handle, handle], [TOKENS, [4]])
        assert_scores(second, [handle, handle], [TOKENS, [4]], other)
        handle.append(token)


def test_a_handle_outlives_the_eviction_of_its_prefix():
    scorer = critic(cache_tokens=40)
    handle = PrefixHandle(models.prompts([10], seed=1)[0])
    for round in range(4):
        assert_scores(scorer, [handle], [TOKENS])
        handle.append(TOKENS[round])
        assert_scores(scorer, models.prompts([30], seed=round + 2), [TOKENS])
    assert scorer.stats.evictions > 0


def test_a_handle_of_one_cache_is_not_trusted_by_another_of_the_same_critic():
    one, two = critic(), critic()
    handle = PrefixHandle([5, 6, 7, 8])
    assert_scores(one, [handle], [TOKENS])
    assert_scores(two, [[9, 9, 9, 9]], [TOKENS])
    assert_scores(two, [handle], [TOKENS])


# Refusals.


def test_an_empty_prefix_is_refused_with_its_row():
    for empty in ([], PrefixHandle([])):
        with pytest.raises(ValueError, match=r"(?i)row.*1.*empty|empty.*row.*1"):
            critic().score([[5], empty], torch.tensor([[3], [3]]))


@pytest.mark.parametrize("token", [models.VOCAB, 10**6, -2])
def test_a_candidate_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=rf"{token}\b.*vocabulary.*{models.VOCAB}"):
        critic().score([[5, 6]], torch.tensor([[3, token]]))


@pytest.mark.parametrize("token", [models.VOCAB, 10**6, -1])
def test_a_prefix_token_outside_the_vocabulary_is_refused(token):
    for prefix in ([5, token, 6], PrefixHandle([5, token, 6])):
        with pytest.raises(ValueError, match=rf"{token}\b.*vocabulary.*{models.VOCAB}"):
            critic().score([prefix], torch.tensor([[3]]))


def test_a_refused_call_leaves_the_cache_as_it_was():
    scorer = critic()
    good, handle = models.prompts([9])[0], PrefixHandle([5, 6])
    assert_scores(scorer, [good, handle], [TOKENS] * 2)
    handle.extend([7, models.VOCAB])
    with pytest.raises(ValueError, match="vocabulary"):
        scorer.score([good, handle], torch.tensor([TOKENS] * 2))
    scorer.cache.check()
    assert scorer.cache.pinned == 0
    handle.sync([5, 6, 7])
    assert_scores(scorer, [good, handle], [TOKENS] * 2)


def test_a_forward_that_fails_leaks_nothing():
    scorer = critic()
    warm = models.prompts([9])[0]
    assert_scores(scorer, [warm], [TOKENS])
    layers = []

    def fail_in_the_second_layer(module, inputs):
        if type(module).__name__ == "LlamaMLP":
            layers.append(module)
            if len(layers) == 2:
                raise RuntimeError("no memory left")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(fail_in_the_second_layer)
    try:
        with pytest.raises(RuntimeError, match="no memory left"):
            scorer.score([[*warm, 50, 51], [8, 9]], torch.tensor([TOKENS] * 2))
    finally:
        hook.remove()
    scorer.cache.check()
    assert scorer.cache.pinned == 0
    # Slots that were never filled must not be found by the next look-up.
    assert_scores(scorer, [[*warm, 50, 51], [8, 9], [8]], [TOKENS] * 3)


def test_rows_and_candidates_must_agree():
    with pytest.raises(ValueError, match=r"2.*\[3, 1\]|\[3, 1\].*2"):
        critic().score([[5], [6]], torch.tensor([[3], [4], [5]]))
    with pytest.raises(ValueError, match=r"(?i)int"):
        critic().score([[5]], torch.tensor([[3.5]]))


def test_a_prefix_beyond_the_critics_positions_is_refused():
    scorer = load_scorer(
        models.saved("llama", "token", max_position_embeddings=32), kind="verl-critic"
    )
    values = oracle.Values(models.tiny("llama", "token", max_position_embeddings=32))
    fits = models.prompts([31])[0]
    assert_scores(scorer, [fits], [TOKENS], values)
    with pytest.raises(ValueError, match=r"(?=.*3[23])(?=.*32)(?=.*position)"):
        scorer.score([[*fits, 9]], torch.tensor([TOKENS]))


def test_a_cache_too_small_for_one_row_says_how_large_it_must_be():
    prefix = models.prompts([50])[0]
    scorer = critic(cache_tokens=20)
    with pytest.raises(ValueError, match="cache_tokens") as refusal:
        scorer.score([prefix], torch.tensor([TOKENS]))
    assert scorer.cache.pinned == 0
    scorer.cache.check()
    needed = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    assert len(prefix) < needed <= len(prefix) + len(TOKENS)
    assert_scores(critic(cache_tokens=needed), [prefix], [TOKENS])
    with pytest.raises(ValueError, match="cache_tokens"):
        critic(cache_tokens=needed - 1).score([prefix], torch.tensor([TOKENS]))
