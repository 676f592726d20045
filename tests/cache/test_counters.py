"""What a step costs: tokens forwarded, counted where they enter the model, and host work."""

import contextlib
import copy
import sys
from dataclasses import dataclass, field

import pytest
import torch

from guided_decode import GuidanceConfig, PrefixHandle, load_scorer
from guided_decode.guidance.step import guide_rows
from tests import models, oracle

K = 6


def critic(**options):
    return load_scorer(models.saved("llama", "token"), kind="verl-critic", **options)


@dataclass
class Spent:
    """Tokens that entered an embedding table, call by call, and what the counters say."""

    forwards: list[int] = field(default_factory=list)
    prefix: int = 0
    candidates: int = 0
    hits: int = 0
    rows: int = 0
    gated: int = 0

    @property
    def tokens(self):
        return sum(self.forwards)


@contextlib.contextmanager
def spending(scorer):
    """What the block spends; the counters must agree with the module's own calls."""
    spent = Spent()

    def count(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            spent.forwards.append(inputs[0].numel())

    scorer.stats.reset()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield spent
    finally:
        hook.remove()
    stats = scorer.stats
    spent.prefix, spent.candidates = stats.prefix_tokens, stats.candidate_tokens
    spent.hits, spent.rows, spent.gated = stats.cache_hits, stats.rows_scored, stats.rows_gated
    assert stats.prefix_tokens + stats.candidate_tokens == spent.tokens
    assert stats.forwards == len(spent.forwards)


def tokens_of_step(step, rows=1):
    """K distinct candidates a row, new ones at each step."""
    first = 3 + (step * K) % 90
    return torch.arange(first, first + K).repeat(rows, 1)


def test_a_first_call_forwards_each_prefix_and_each_candidate_once():
    scorer = critic()
    prefixes = models.prompts([12, 5, 30])
    with spending(scorer) as spent:
        scorer.score(prefixes, tokens_of_step(0, rows=3))
    assert (spent.prefix, spent.candidates) == (12 + 5 + 30, 3 * K)
    assert spent.rows == 3
    assert len(spent.forwards) == 1


@pytest.mark.parametrize("form", [list, PrefixHandle])
def test_a_steady_step_forwards_its_candidates_alone(form):
    scorer = critic()
    rows = models.prompts([12, 5, 30])
    handles = [form(row) for row in rows]
    scorer.score(handles, tokens_of_step(0, rows=3))
    for step in range(1, 20):
        for number, handle in enumerate(handles):  # each row goes on with one of its candidates
            handle.append(int(tokens_of_step(step - 1)[0, (number + step) % K]))
        with spending(scorer) as spent:
            scorer.score(handles, tokens_of_step(step, rows=3))
        assert (spent.prefix, spent.candidates, len(spent.forwards)) == (0, 3 * K, 1)


def test_a_chosen_token_from_outside_the_candidates_is_forwarded_once():
    scorer = critic()
    row = models.prompts([12])[0]
    scorer.score([row], tokens_of_step(0))
    with spending(scorer) as spent:
        scorer.score([[*row, 99]], tokens_of_step(1))
    assert (spent.prefix, spent.candidates) == (1, K)
    with spending(scorer) as spent:
        scorer.score([[*row, 99]], tokens_of_step(2))
    assert (spent.prefix, spent.candidates) == (0, K)


def test_cached_candidates_are_not_forwarded_again():
    scorer = critic()
    row = models.prompts([12])[0]
    scorer.score([row], torch.tensor([[3, 4, 5]]))
    with spending(scorer) as spent:
        scorer.score([row], torch.tensor([[3, 4, 5]]))
    assert (spent.tokens, len(spent.forwards)) == (0, 0)
    assert spent.hits >= 3
    with spending(scorer) as spent:
        scorer.score([row], torch.tensor([[4, 8, 5, 9]]))
    assert (spent.prefix, spent.candidates) == (0, 2)


def test_a_prefix_whose_end_was_a_candidate_of_another_row_is_found():
    scorer = critic()
    row = models.prompts([12])[0]
    scorer.score([row], torch.tensor([[3, 4, 5]]))
    with spending(scorer) as spent:
        scorer.score([[*row, 3], [*row, 5]], torch.tensor([[8], [9]]))
    assert (spent.prefix, spent.candidates) == (0, 2)


def test_samples_of_one_prompt_forward_the_prompt_once():
    scorer = critic()
    prompt = models.prompts([40])[0]
    with spending(scorer) as spent:
        scorer.score([list(prompt) for _ in range(8)], tokens_of_step(0, rows=8))
    assert (spent.prefix, spent.candidates) == (40, K)
    # They part: each goes on with another candidate, and has its own from then on.
    rows = [[*prompt, 3 + n % K] for n in range(8)]
    with spending(scorer) as spent:
        scorer.score(rows, tokens_of_step(1, rows=8))
    assert (spent.prefix, spent.candidates) == (0, K * K)  # six distinct rows of eight


def test_prompts_that_share_a_beginning_forward_it_once():
    scorer = critic()
    stem = models.prompts([40])[0]
    with spending(scorer) as spent:
        scorer.score([[*stem, 3, 4], [*stem, 5], stem[:20]], torch.tensor([[9], [9], [9]]))
    assert (spent.prefix, spent.candidates) == (43, 3)


def test_no_token_is_forwarded_twice_while_there_is_room():
    scorer = critic(cache_tokens=4096)
    generator = torch.Generator().manual_seed(0)
    rows = models.prompts([10, 20, 30, 40])
    wanted = set()
    scorer.stats.reset()
    for _ in range(24):
        candidates = torch.stack(
            [torch.randperm(90, generator=generator)[:K] + 3 for _ in range(len(rows))]
        )
        scorer.score(rows, candidates)
        for row, chosen in zip(rows, candidates.tolist(), strict=True):
            wanted |= {tuple(row[: n + 1]) for n in range(len(row))}
            wanted |= {(*row, token) for token in chosen}
        pick = torch.randint(0, 2 * K, (len(rows),), generator=generator).tolist()
        for row, chosen, index in zip(rows, candidates.tolist(), pick, strict=True):
            row.append(chosen[index] if index < K else 95)
        if len(rows) < 6:
            rows.append(list(rows[0][:-3]))  # a fork, a little back
    assert scorer.stats.evictions == 0
    assert scorer.stats.prefix_tokens + scorer.stats.candidate_tokens == len(wanted)


def test_terminals_are_not_forwarded_under_the_baseline_rule():
    scorer = critic()
    logits = torch.zeros(2, models.VOCAB)
    logits[:, :8] = torch.arange(8.0, 0, -1)  # candidates 0 to 7, of them 2 and 4 end
    with spending(scorer) as spent:
        guide_rows(
            scorer, logits, models.prompts([9, 4]), GuidanceConfig(top_k=8), terminals=[2, 4]
        )
    assert (spent.prefix, spent.candidates) == (13, 2 * 6)


def test_rows_whose_every_candidate_ends_forward_nothing_more_than_their_prefix():
    scorer = critic()
    logits = torch.full((1, models.VOCAB), -torch.inf)
    logits[:, models.EOS] = 0.0
    with spending(scorer) as spent:
        guide_rows(
            scorer, logits, models.prompts([9]), GuidanceConfig(top_k=8), terminals=[models.EOS]
        )
    assert spent.candidates == 0
    assert spent.prefix <= 9


def test_a_gated_row_forwards_nothing_until_it_is_scored_again():
    scorer = critic()
    row = models.prompts([12])[0]
    config = GuidanceConfig(top_k=4, gate=0.9)
    sure = torch.zeros(1, models.VOCAB)
    sure[0, 50] = 30.0
    unsure = torch.zeros(1, models.VOCAB)
    guide_rows(scorer, unsure, [row], config, terminals=())
    for step in range(5):
        row.append(50 + step)
        with spending(scorer) as spent:
            guided = guide_rows(scorer, sure, [row], config, terminals=())
        assert (spent.tokens, spent.rows, spent.gated) == (0, 0, 1)
        assert guided[0, 50] == 30.0
        assert (guided[0] > -torch.inf).sum() == 4  # its tail rule still applies
    row.append(60)
    with spending(scorer) as spent:
        guided = guide_rows(scorer, unsure, [row], config, terminals=())
    # The skipped tokens are caught up in one chunk.
    assert (spent.prefix, spent.candidates, spent.gated, len(spent.forwards)) == (6, 4, 0, 1)
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    oracle.assert_row_equal(guided[0], brute.row(row, unsure[0], config))


def test_an_unguided_row_among_guided_ones_is_not_scored():
    scorer = critic()
    logits = torch.randn(3, models.VOCAB, generator=torch.Generator().manual_seed(0))
    off = GuidanceConfig(beta=0.0, top_k=4, tail="keep")
    configs = [GuidanceConfig(top_k=4), off, GuidanceConfig(top_k=3)]
    with spending(scorer) as spent:
        guided = guide_rows(
            scorer, logits, models.prompts([9, 20, 4], seed=1), configs, terminals=()
        )
    assert (spent.prefix, spent.candidates, spent.rows) == (9 + 4, 4 + 3, 2)
    assert torch.equal(guided[1], logits[1])


def test_unchosen_candidates_are_evicted_before_any_prefix():
    first, second = models.prompts([30, 30])
    scorer = critic(cache_tokens=100)
    scorer.score([first], torch.arange(3, 13)[None])  # 30 + 10
    scorer.score([second], torch.arange(3, 13)[None])  # 80 of 100
    scorer.score([second], torch.arange(20, 45)[None])  # 25 more: 5 too many
    assert 5 <= scorer.stats.evictions <= 20
    with spending(scorer) as spent:
        scorer.score([first, second], torch.tensor([[90], [90]]))
    assert (spent.prefix, spent.candidates) == (0, 2)


def test_of_the_prefixes_the_least_recently_used_is_evicted():
    scorer = critic(cache_tokens=100)
    old, young, new = models.prompts([40, 40, 40])
    for row in (old, young, new):
        scorer.score([row], torch.tensor([[9]]))
    with spending(scorer) as spent:
        scorer.score([young], torch.tensor([[9]]))
    assert spent.prefix == 0


def test_what_a_rewound_handle_gave_up_is_evicted_before_any_other_prefix():
    """Drafts that were rejected: a branch that nobody reads goes first, however young it is."""
    old, live = models.prompts([30, 30])
    scorer = critic(cache_tokens=80)
    handle, draft = PrefixHandle(live), PrefixHandle([*live, 9, 10, 11, 12, 13, 14])
    scorer.score([old], torch.tensor([[5]]))  # 31
    scorer.score([handle, draft], torch.tensor([[9, 20], [6, -1]]))  # 69
    handle.append(20)
    draft.rewind(len(live))
    draft.extend([20, 21])
    scorer.score([handle, draft], torch.tensor([[21, 22], [7, -1]]))
    # Unchosen candidates make room for 11 of these, the branch 9 to 14 for the others.
    scorer.score([handle], torch.arange(40, 56)[None])
    with spending(scorer) as spent:
        scorer.score([old, handle, draft], torch.empty(3, 0, dtype=torch.int64))
    assert spent.prefix == 0
    with spending(scorer) as spent:
        scorer.score([[*live, 9, 10, 11, 12]], torch.empty(1, 0, dtype=torch.int64))
    assert spent.prefix > 0


@pytest.mark.parametrize("kind", ["verl-critic", "implicit"])
def test_a_copy_counts_its_own_evictions(kind):
    if kind == "implicit":
        scorer = load_scorer(
            models.tiny("llama", "lm"), kind, reference=models.tiny("llama", "lm"), cache_tokens=64
        )
    else:
        scorer = critic(cache_tokens=64)
    for row in models.prompts([40, 40]):
        scorer.score([row], torch.tensor([[9]]))
    before = scorer.stats.evictions
    assert before > 0
    copied = copy.deepcopy(scorer)
    for row in models.prompts([40, 40]):
        copied.score([row], torch.tensor([[9]]))
    assert copied.stats.evictions == 2 * before
    assert scorer.stats.evictions == before


def test_the_counters_start_again_at_zero():
    scorer = critic()
    scorer.score([[5, 6]], torch.tensor([[7]]))
    assert scorer.stats.seconds > 0
    scorer.stats.reset()
    names = ["rows_scored", "rows_gated", "prefix_tokens", "candidate_tokens", "cache_hits"]
    names += ["evictions", "passthroughs", "forwards", "seconds"]
    assert [getattr(scorer.stats, name) for name in names] == [0] * len(names)


# Host work.


def host_work(prefix_length, k, rows, long):
    """Median node operations and Python-level calls of a steady step with handles."""
    scorer = load_scorer(long, kind="verl-critic", cache_tokens=rows * prefix_length + 4096)
    handles = [PrefixHandle(p) for p in models.prompts([prefix_length] * rows, seed=k)]
    operations, calls = [], []

    def profile(frame, event, argument):
        calls[-1] += event in ("call", "c_call")

    for step in range(12):
        first = 3 + step % 4 * 20
        candidates = torch.arange(first, first + k).repeat(rows, 1)
        before = scorer.cache.operations
        calls.append(0)
        sys.setprofile(profile)
        try:
            scorer.score(handles, candidates)
        finally:
            sys.setprofile(None)
        operations.append(scorer.cache.operations - before)
        for number, handle in enumerate(handles):
            handle.append(first + number % k)
    assert scorer.stats.evictions == 0
    return sorted(operations[2:])[5], sorted(calls[2:])[5]


def test_the_look_up_of_a_rewound_handle_begins_where_its_history_ends(long):
    scorer = load_scorer(long, kind="verl-critic", cache_tokens=8192)
    prompt = models.prompts([4096])[0]
    handle, draft = PrefixHandle(prompt), PrefixHandle([*prompt, 9, 10])
    scorer.score([handle, draft], torch.tensor([[9, 20], [6, 7]]))
    written, write = [], scorer.cache.tables.write

    def watched(pieces, points=()):
        # A point is an entry of a row that rides.
        written.extend([len(slots) for _, _, slots in pieces] + [len(rows) for rows, *_ in points])
        write(pieces, points)

    scorer.cache.tables.write = watched
    for token in range(20, 26):
        handle.append(token)
        draft.rewind(len(handle) - 1)
        draft.extend([token, token + 1, 9])
        scorer.score([handle, draft], torch.tensor([[token + 1, 60], [6, 7]]))
        # Nothing of the prefix is written again.
        assert 0 < sum(written) <= 1 + 3
        written.clear()


@pytest.fixture(scope="module")
def long():
    return models.saved("llama", "token", max_position_embeddings=8192, num_hidden_layers=1)


@pytest.fixture(scope="module")
def short_work(long):
    return host_work(64, 2, 4, long)


@pytest.mark.parametrize(("prefix_length", "k"), [(64, 18), (4096, 2), (4096, 18)])
def test_host_work_grows_neither_with_k_nor_with_the_prefix(short_work, long, prefix_length, k):
    operations, calls = host_work(prefix_length, k, 4, long)
    assert operations <= short_work[0]
    assert calls <= 1.02 * short_work[1]


def test_host_work_grows_with_the_rows_by_a_constant_each(short_work, long):
    operations, calls = host_work(64, 2, 16, long)
    assert operations <= 4 * short_work[0]
    assert calls <= 4 * short_work[1]
