"""One scorer, many threads: every answer is what a scorer of its own gives, no count is lost."""

import threading

import pytest
import torch

from guided_decode import GuidanceConfig, PrefixHandle, load_scorer
from guided_decode.guidance.step import guide_rows
from guided_decode.integrations.transformers import (
    GuidedDecoding,
    TrunkLookahead,
    ValueGuidedLogitsProcessor,
)
from tests import models

# 2,000 calls: half of them with a cache that is too small for two threads.
THREADS, CALLS, NEW_TOKENS = 4, 1000, 8
CONFIG = GuidanceConfig(top_k=4, kl_coef=0.1)
SMALL, LARGE = 48, 4096


def on_threads(*work):
    """Runs each piece of work on a thread of its own; raises what one of them raised."""
    errors, start = [], threading.Barrier(len(work))

    def run(piece):
        start.wait()
        try:
            piece()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(piece,)) for piece in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def critic(cache_tokens=LARGE):
    return load_scorer(
        models.tiny("llama", "token"),
        kind="verl-critic",
        reference=models.tiny("llama", "lm"),
        cache_tokens=cache_tokens,
    )


def generated(scorer, prompt, **options):
    ids = torch.tensor([prompt])
    return (
        models.tiny("llama", "lm")
        .generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            **options,
        )[0]
        .tolist()
    )


def by_loop(scorer, prompt):
    return generated(scorer, prompt, custom_generate=GuidedDecoding(scorer, CONFIG))


class Asked:
    """The same questions for any scorer, by number: `score`, and `guide_rows` with its kl term."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        # Few stems, so that threads meet in the tree.
        stems = models.prompts([9, 12, 7], seed=1)
        self.rows = [[*stems[n % 3], *(3 + n % 7 for _ in range(n % 5))] for n in range(24)]
        self.candidates = torch.randint(3, models.VOCAB, (24, 1, 4), generator=generator)
        self.logits = torch.randn(24, 1, models.VOCAB, generator=generator)

    def answer(self, scorer, n, row):
        if n % 2:
            return torch.cat([each.flatten() for each in scorer.score([row], self.candidates[n])])
        return guide_rows(scorer, self.logits[n], [row], CONFIG)


@pytest.mark.parametrize("cache_tokens", [SMALL, LARGE])
def test_four_threads_on_one_scorer_give_the_answers_of_one(cache_tokens):
    asked, shared = Asked(), critic(cache_tokens)
    expected = [asked.answer(critic(), n, row) for n, row in enumerate(asked.rows)]
    prompts = models.prompts([6, 6], seed=2)
    loops = [by_loop(critic(), prompt) for prompt in prompts]

    def work(thread):
        each = (CALLS - THREADS * 2 * NEW_TOKENS) // THREADS
        for call in range(each):
            n = (call * 5 + thread * 7) % len(asked.rows)
            row = asked.rows[n] if call % 3 else PrefixHandle(asked.rows[n])
            got = asked.answer(shared, n, row)
            torch.testing.assert_close(got, expected[n], rtol=1e-4, atol=1e-4)
            if call % (each // 2) == 1:
                assert by_loop(shared, prompts[thread % 2]) == loops[thread % 2]

    on_threads(*(lambda t=t: work(t) for t in range(THREADS)))
    for cache in (shared.cache, shared.reference.cache):
        cache.check()
    alone = [asked.answer(shared, n, row) for n, row in enumerate(asked.rows)]
    for got, wanted in zip(alone, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_no_count_of_four_threads_is_lost():
    scorer = load_scorer(
        models.tiny("llama", "lm"), kind="implicit", reference=models.tiny("llama", "lm", seed=1)
    )
    none = torch.full((1, 2), -1)

    def work():
        for n in range(50):
            scorer.score([[5, 6, 7 + n % 3]], none)
            scorer.stats.add(rows_gated=1)

    on_threads(*[work] * THREADS)
    assert scorer.stats.rows_scored == scorer.stats.rows_gated == THREADS * 50
    tokens = scorer.stats.prefix_tokens + scorer.stats.cache_hits
    assert tokens == 2 * THREADS * 50 * 3


def test_scorers_that_share_a_reward_model_and_clear_it_meet_without_a_deadlock():
    reward = load_scorer(models.tiny("llama", "sequence"), kind="reward-model", cache_tokens=SMALL)
    scorers = [
        load_scorer(models.tiny("llama", "token"), "verl-critic", reward=reward, cache_tokens=SMALL)
        for _ in range(2)
    ]
    logits = torch.zeros(1, models.VOCAB)
    config = GuidanceConfig(top_k=4)
    expected = guide_rows(scorers[0], logits, [[5, 6, 7]], config, terminals=[2])

    def guided(scorer):
        for _ in range(40):
            got = guide_rows(scorer, logits, [[5, 6, 7]], config, terminals=[2])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def cleared():
        for scorer in (*scorers, reward) * 20:
            scorer.cache.clear()
            assert scorer.cache.cached_tokens >= 0
            assert scorer.refusal([5, 6, 7], 4) is None

    on_threads(*(lambda s=s: guided(s) for s in (*scorers, *scorers)), cleared)


def test_a_handle_that_two_threads_append_to_keeps_every_token_and_its_answers():
    scorer, handle = critic(), PrefixHandle([5])

    def work(token):
        for n in range(200):
            handle.append(token)
            if n % 20 == 0:
                scorer.score([handle], torch.tensor([[3, 4]]))

    on_threads(lambda: work(8), lambda: work(9))
    assert sorted(handle.tokens.tolist()) == [5, *[8] * 200, *[9] * 200]
    expected = critic().score([handle.tokens.copy()], torch.tensor([[3, 4]]))
    torch.testing.assert_close(
        scorer.score([handle], torch.tensor([[3, 4]])).values, expected.values, rtol=0, atol=1e-4
    )


def test_threads_share_a_trunk_scorer_and_its_loop():
    policy = models.tiny("llama", "lm")
    head = {"head.weight": torch.randn(1, 48, generator=torch.Generator().manual_seed(9))}
    config = GuidanceConfig(top_k=4, gate=0.3)
    prompts = models.prompts([6, 7, 8, 9], seed=3)

    def loop(looking, prompt):
        return generated(None, prompt, custom_generate=looking)

    expected = [
        loop(TrunkLookahead(load_scorer(policy, head=head), config), prompt) for prompt in prompts
    ]
    shared = TrunkLookahead(load_scorer(policy, head=head, cache_tokens=SMALL), config)

    def work(prompt, wanted):
        for _ in range(4):
            assert loop(shared, prompt) == wanted

    pairs = zip(prompts, expected, strict=True)
    on_threads(*(lambda p=p, w=w: work(p, w) for p, w in pairs))


def test_threads_share_a_logits_processor():
    scorer = critic()
    processor = ValueGuidedLogitsProcessor(scorer, CONFIG)
    prompts = models.prompts([6, 6, 6, 6], seed=4)
    expected = [by_loop(critic(), prompt) for prompt in prompts]

    def work(prompt, wanted):
        for _ in range(4):
            assert generated(scorer, prompt, logits_processor=[processor]) == wanted

    pairs = zip(prompts, expected, strict=True)
    on_threads(*(lambda p=p, w=w: work(p, w) for p, w in pairs))
