"""Any sequence of score calls, under any budget, equals brute force and leaks no slot."""

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_decode import PrefixHandle, load_scorer
from tests import models, oracle

LONGEST, K = 40, 5
# Few token ids, so that prefixes meet, and candidates come back as prefixes.
TOKENS = [models.BOS, models.EOS, 5, 6, 7, 8]

# From less than a row needs to more than all of them; most schedules evict.
CACHE_TOKENS = st.one_of(st.integers(4, 30), st.integers(30, 80), st.just(1000))
FORWARD_TOKENS = st.one_of(st.integers(1, 8), st.just(4096))
SEED = st.integers(0, 2**32)
STEPS = st.integers(1, 24)


@functools.cache
def values(arch, drop_bos):
    return oracle.Values(models.tiny(arch, "token"), models.BOS if drop_bos else None)


class Requests:
    """Live rows, as lists or as handles, that take random turns; each call is checked."""

    def __init__(self, scorer, brute, seed):
        self.scorer, self.brute = scorer, brute
        # How often rows decode together: those of an implicit reward never ride.
        self.decodes = 0.2 if isinstance(brute, Critic) else 0.0
        self.random = random.Random(seed)
        self.rows: list[list[int]] = []
        self.handles: list[PrefixHandle | None] = []
        self.last: list[list[int]] = []  # the candidates that a row was last scored with
        self.refused = 0
        self.begin(self.tokens(1, 12))

    def step(self):
        turns = [self.start, self.grow, self.choose, self.choose, self.fork, self.rewind]
        if self.random.random() < self.decodes:
            self.decode()
        else:
            self.random.choice(turns)()
        if self.random.random() < 0.2:
            self.leave()
        if self.random.random() < 0.03:
            self.scorer.cache.clear()
            self.check_cache()
        if self.random.random() < 0.8:
            self.score()

    def tokens(self, least, most):
        return self.random.choices(TOKENS, k=self.random.randint(least, most))

    def pick(self):
        return self.random.randrange(len(self.rows))

    def begin(self, tokens, last=()):
        self.rows.append(list(tokens))
        self.handles.append(PrefixHandle(tokens) if self.random.random() < 0.6 else None)
        self.last.append(list(last))

    def start(self):
        self.begin(self.tokens(1, 20))

    def extend(self, row, tokens):
        tokens = tokens[: LONGEST - len(self.rows[row])]
        self.rows[row] += tokens
        if self.handles[row] is not None:
            self.handles[row].extend(tokens)

    def grow(self):
        self.extend(self.pick(), self.tokens(1, 6))

    def choose(self, rows=None):
        """Rows, every one if not told, go on with one of their last candidates."""
        for row in range(len(self.rows)) if rows is None else rows:
            last = self.last[row]
            if last:
                self.extend(row, [self.random.choice(last)])
                self.last[row] = []

    def decode(self):
        """Rows that have handles go on by their candidates together, as an engine's do: these ride
        from the third step on."""
        live = [row for row, handle in enumerate(self.handles) if handle is not None]
        live = self.random.sample(live, min(len(live), self.random.randint(1, 4)))
        for _ in range(self.random.randint(3, 6) if live else 0):
            self.score(live, at_least=1)
            self.choose(live)

    def fork(self):
        row = self.pick()
        self.begin(self.rows[row], self.last[row])

    def rewind(self):
        row = self.pick()
        kept = self.rows[row][: max(1, len(self.rows[row]) - self.random.randint(1, 10))]
        self.rows[row] = kept + self.tokens(0, 2)
        handle = self.handles[row]
        if handle is not None and self.random.random() < 0.5:
            handle.sync(self.rows[row])
        elif handle is not None:
            handle.rewind(len(kept))
            handle.extend(self.rows[row][len(kept) :])

    def leave(self):
        if len(self.rows) > 1:
            row = self.pick()
            for lists in (self.rows, self.handles, self.last):
                lists.pop(row)

    def score(self, asked=None, at_least=0):
        if asked is None:
            asked = [self.pick() for _ in range(self.random.randint(1, 6))]
        chosen = [self.random.sample(TOKENS, self.random.randint(at_least, K)) for _ in asked]
        candidates = torch.tensor([row + [-1] * (K - len(row)) for row in chosen])
        prefixes = [
            list(self.rows[n]) if self.handles[n] is None else self.handles[n] for n in asked
        ]
        needed = max(
            self.brute.slots(self.rows[n], row) for n, row in zip(asked, chosen, strict=True)
        )
        if needed > self.scorer.cache.capacity:
            with pytest.raises(ValueError, match=r"cache_tokens must be at least \d+"):
                self.scorer.score(prefixes, candidates)
            self.refused += 1
        else:
            scores = self.scorer.score(prefixes, candidates)
            for n, row, got, baseline in zip(asked, chosen, *scores, strict=True):
                expected = torch.tensor(self.brute.after(self.rows[n], row))
                torch.testing.assert_close(got[: len(row)], expected, rtol=0, atol=1e-4)
                assert got[len(row) :].isnan().all()
                assert abs(baseline.item() - self.brute([self.rows[n]])[0]) < 1e-4
                self.last[n] = row
        self.check_cache()

    def check_cache(self):
        cache = self.scorer.cache
        cache.check()
        assert cache.pinned == 0
        assert cache.free_slots + cache.cached_tokens == cache.capacity


class Critic:
    """A critic by brute force, and the slots that a row of it needs alone in the cache."""

    def __init__(self, arch, drop_bos=False):
        self.values = values(arch, drop_bos)
        self.after = self.values.after

    def __call__(self, sequences):
        return self.values(sequences)

    def slots(self, prefix, chosen):
        return len(self.values.read(prefix)) + len(chosen)


class LogRatios:
    """Implicit rewards by brute force; candidates need no slots."""

    def __init__(self):
        pair = [oracle.LogProbs(models.tiny("mistral", "lm", seed)) for seed in (11, 12)]
        self.all = functools.cache(
            lambda prefix: [a - b for a, b in zip(*(lm(prefix) for lm in pair), strict=True)]
        )

    def __call__(self, sequences):
        return [0.0 for _ in sequences]

    def after(self, prefix, tokens):
        return [self.all(tuple(prefix))[token] for token in tokens]

    def slots(self, prefix, chosen):
        return len(prefix)


LOG_RATIOS = LogRatios()


def run(scorer, brute, seed, steps):
    requests = Requests(scorer, brute, seed)
    for _ in range(steps):
        requests.step()
    return requests


def critic(arch, kind, cache_tokens, max_forward_tokens):
    return load_scorer(
        models.tiny(arch, "token"),
        kind=kind,
        cache_tokens=cache_tokens,
        max_forward_tokens=max_forward_tokens,
    )


@pytest.mark.parametrize("arch", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_any_schedule_equals_brute_force(arch):
    ridden = {False: 0, True: 0}

    @settings(max_examples=150)
    @given(
        cache_tokens=CACHE_TOKENS,
        forward_tokens=FORWARD_TOKENS,
        seed=SEED,
        steps=STEPS,
        rides=st.booleans(),
    )
    def schedules(cache_tokens, forward_tokens, seed, steps, rides):
        scorer = critic(arch, "verl-critic", cache_tokens, forward_tokens)
        scorer.cache.rides = rides
        run(scorer, Critic(arch), seed, steps)
        ridden[rides] += scorer.cache.ridden

    schedules()
    assert ridden[False] == 0
    assert ridden[True] > 100


def test_any_schedule_of_a_critic_without_bos():
    ridden = 0

    @settings(max_examples=100)
    @given(cache_tokens=CACHE_TOKENS, seed=SEED, steps=STEPS)
    def schedules(cache_tokens, seed, steps):
        nonlocal ridden
        scorer = critic("llama", "ppo-critic", cache_tokens, 4096)
        run(scorer, Critic("llama", drop_bos=True), seed, steps)
        ridden += scorer.cache.ridden

    schedules()
    assert ridden > 100


@settings(max_examples=100)
@given(cache_tokens=CACHE_TOKENS, forward_tokens=FORWARD_TOKENS, seed=SEED, steps=STEPS)
def test_any_schedule_of_an_implicit_reward(cache_tokens, forward_tokens, seed, steps):
    scorer = load_scorer(
        models.tiny("mistral", "lm", seed=11),
        kind="implicit",
        reference=models.tiny("mistral", "lm", seed=12),
        cache_tokens=cache_tokens,
        max_forward_tokens=forward_tokens,
    )
    run(scorer, LOG_RATIOS, seed, steps)
    scorer.reference.cache.check()
    assert scorer.reference.cache.pinned == 0


def test_the_schedules_evict_hit_and_are_refused():
    refused = 0
    for seed, cache_tokens in enumerate((20, 30, 60)):
        scorer = critic("llama", "verl-critic", cache_tokens, 4096)
        refused += run(scorer, Critic("llama"), seed, 30).refused
        assert scorer.stats.evictions > 20
        assert scorer.stats.cache_hits > 20
    assert refused > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "qwen2-sliding", "qwen3", "gemma"])
@settings(max_examples=300)
@given(
    cache_tokens=st.integers(4, 120),
    forward_tokens=st.integers(1, 64),
    seed=SEED,
    steps=st.integers(30, 90),
)
def test_long_schedules_equal_brute_force(arch, cache_tokens, forward_tokens, seed, steps):
    run(critic(arch, "verl-critic", cache_tokens, forward_tokens), Critic(arch), seed, steps)


@settings(max_examples=100)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["extend", "sync", "rewind"]),
            st.lists(st.sampled_from(TOKENS), max_size=6),
        ),
        max_size=20,
    )
)
def test_a_handle_always_holds_what_it_was_given(operations):
    handle, model = PrefixHandle([5]), [5]
    seen = [(handle.version, list(model))]
    for what, tokens in operations:
        if what == "extend":
            handle.extend(tokens)
            model += tokens
        elif what == "rewind":
            length = max(0, len(model) - len(tokens))
            handle.rewind(length)
            model = model[:length]
        elif tokens:
            handle.sync(tokens)
            model = list(tokens)
        assert list(handle.tokens) == model
        assert len(handle) == len(model)
        assert handle.lowest == min([0, *model])
        assert handle.highest == max([0, *model])
        for version, before in seen:
            kept = handle.kept(version)
            assert before[:kept] == model[: min(kept, len(before))]
        seen.append((handle.version, list(model)))


def test_a_handle_cannot_be_rewound_to_more_than_it_has():
    with pytest.raises(ValueError, match=r"rewind\(3\) of a handle with 2 tokens"):
        PrefixHandle([5, 6]).rewind(3)
