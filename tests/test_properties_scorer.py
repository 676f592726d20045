"""Any sequence of score calls, under any budget, equals brute force and leaks no slot."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_decode import PrefixHandle, load_scorer
from tests import models, oracle

LONGEST, K = 40, 5
# Few token ids, so that prefixes meet, and candidates come back as prefixes.
TOKEN = st.sampled_from([models.BOS, models.EOS, 5, 6, 7, 8])
CANDIDATES = st.lists(TOKEN, max_size=K, unique=True)

START = st.tuples(st.just("start"), st.lists(TOKEN, min_size=1, max_size=12), st.booleans())
GROW = st.tuples(st.just("grow"), st.integers(0, 7), st.lists(TOKEN, min_size=1, max_size=4))
CHOOSE = st.tuples(st.just("choose"), st.integers(0, 7), st.integers(0, K))
FORK = st.tuples(st.just("fork"), st.integers(0, 7), st.booleans())
REWIND = st.tuples(
    st.just("rewind"), st.integers(0, 7), st.integers(1, 8), st.lists(TOKEN, max_size=2)
)
LEAVE = st.tuples(st.just("leave"), st.integers(0, 7))
SCORE = st.tuples(
    st.just("score"), st.lists(st.tuples(st.integers(0, 7), CANDIDATES), min_size=1, max_size=7)
)
CLEAR = st.tuples(st.just("clear"))
ACTION = st.one_of(START, GROW, CHOOSE, FORK, REWIND, LEAVE, SCORE, SCORE, SCORE, CHOOSE)
ACTIONS = st.lists(st.one_of(ACTION, ACTION, ACTION, CLEAR), min_size=4, max_size=24)


@functools.cache
def values(arch, drop_bos):
    return oracle.Values(models.tiny(arch, "token"), models.BOS if drop_bos else None)


class Requests:
    """Live rows, as lists or as handles, and what each was last scored with."""

    def __init__(self, scorer, brute):
        self.scorer, self.brute = scorer, brute
        self.rows: list[list[int]] = [[5, 6]]
        self.handles: list[PrefixHandle | None] = [PrefixHandle([5, 6])]
        self.last: list[list[int]] = [[7, 8]]

    def do(self, action):
        name, *arguments = action
        if name != "start" and name != "score" and name != "clear":
            arguments[0] %= len(self.rows)
        getattr(self, name)(*arguments)

    def start(self, tokens, as_handle):
        self.rows.append(list(tokens))
        self.handles.append(PrefixHandle(tokens) if as_handle else None)
        self.last.append([])

    def grow(self, row, tokens):
        tokens = tokens[: LONGEST - len(self.rows[row])]
        self.rows[row] += tokens
        if self.handles[row] is not None:
            self.handles[row].extend(tokens)

    def choose(self, row, number):
        """Goes on with one of the candidates that were scored last, as decoding does."""
        if number < len(self.last[row]) and len(self.rows[row]) < LONGEST:
            self.grow(row, [self.last[row][number]])
            self.last[row] = []

    def fork(self, row, as_handle):
        self.start(self.rows[row], as_handle)
        self.last[-1] = self.last[row]

    def rewind(self, row, count, tokens):
        kept = self.rows[row][: max(1, len(self.rows[row]) - count)]
        self.rows[row] = kept + tokens
        if self.handles[row] is not None:
            self.handles[row].sync(self.rows[row])

    def leave(self, row):
        if len(self.rows) > 1:
            for lists in (self.rows, self.handles, self.last):
                lists.pop(row)

    def clear(self):
        self.scorer.cache.clear()
        self.check_cache()

    def score(self, asked):
        asked = [(number % len(self.rows), chosen) for number, chosen in asked]
        candidates = torch.full((len(asked), K), -1)
        for position, (number, chosen) in enumerate(asked):
            candidates[position, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
            self.last[number] = chosen
        prefixes = [
            list(self.rows[n]) if self.handles[n] is None else self.handles[n] for n, _ in asked
        ]
        scores = self.scorer.score(prefixes, candidates)
        for position, (number, chosen) in enumerate(asked):
            row = self.rows[number]
            expected = torch.full((K,), torch.nan)
            expected[: len(chosen)] = torch.tensor(self.brute.after(row, chosen))
            torch.testing.assert_close(
                scores.values[position], expected, rtol=0, atol=1e-4, equal_nan=True
            )
            assert abs(scores.baseline[position].item() - self.brute([row])[0]) < 1e-4
        self.check_cache()

    def check_cache(self):
        cache = self.scorer.cache
        cache.check()
        assert cache.pinned == 0
        assert cache.free_slots + cache.cached_tokens == cache.capacity


def run(scorer, brute, actions):
    requests = Requests(scorer, brute)
    for action in actions:
        requests.do(action)
    requests.score([(n, [5, 8]) for n in range(len(requests.rows))])


def critic(arch, kind, cache_tokens, max_forward_tokens):
    return load_scorer(
        models.tiny(arch, "token"),
        kind=kind,
        cache_tokens=cache_tokens,
        max_forward_tokens=max_forward_tokens,
    )


class LogRatios:
    """Implicit rewards by brute force, in the place of values."""

    def __init__(self):
        self.known = {}

    def __call__(self, sequences):
        return [0.0 for _ in sequences]

    def after(self, prefix, tokens):
        key = tuple(prefix)
        if key not in self.known:
            pair = [oracle.LogProbs(models.tiny("mistral", "lm", seed)) for seed in (11, 12)]
            self.known[key] = [a - b for a, b in zip(*(lm(prefix) for lm in pair), strict=True)]
        return [self.known[key][token] for token in tokens]


LOG_RATIOS = LogRatios()


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@settings(max_examples=200)
@given(
    cache_tokens=st.sampled_from([LONGEST + K, LONGEST + K + 7, 2 * LONGEST, 1000]),
    max_forward_tokens=st.sampled_from([1, 3, 16, 4096]),
    actions=ACTIONS,
)
def test_any_schedule_equals_brute_force(arch, cache_tokens, max_forward_tokens, actions):
    scorer = critic(arch, "verl-critic", cache_tokens, max_forward_tokens)
    run(scorer, values(arch, drop_bos=False), actions)


@settings(max_examples=100)
@given(cache_tokens=st.sampled_from([LONGEST + K, 1000]), actions=ACTIONS)
def test_any_schedule_of_a_critic_without_bos(cache_tokens, actions):
    scorer = critic("llama", "ppo-critic", cache_tokens, 4096)
    run(scorer, values("llama", drop_bos=True), actions)


@settings(max_examples=100)
@given(
    cache_tokens=st.sampled_from([LONGEST, LONGEST + 7, 1000]),
    max_forward_tokens=st.sampled_from([1, 5, 4096]),
    actions=ACTIONS,
)
def test_any_schedule_of_an_implicit_reward(cache_tokens, max_forward_tokens, actions):
    scorer = load_scorer(
        models.tiny("mistral", "lm", seed=11),
        kind="implicit",
        reference=models.tiny("mistral", "lm", seed=12),
        cache_tokens=cache_tokens,
        max_forward_tokens=max_forward_tokens,
    )
    run(scorer, LOG_RATIOS, actions)
    scorer.reference.cache.check()
    assert scorer.reference.cache.pinned == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "qwen2-sliding", "qwen3", "gemma"])
@settings(max_examples=500)
@given(
    cache_tokens=st.integers(LONGEST + K, 3 * LONGEST),
    max_forward_tokens=st.integers(1, 64),
    actions=st.lists(ACTION, min_size=10, max_size=60),
)
def test_long_schedules_equal_brute_force(arch, cache_tokens, max_forward_tokens, actions):
    scorer = critic(arch, "verl-critic", cache_tokens, max_forward_tokens)
    run(scorer, values(arch, drop_bos=False), actions)


@settings(max_examples=60)
@given(operations=st.lists(st.tuples(st.booleans(), st.lists(TOKEN, max_size=6)), max_size=20))
def test_a_handle_always_holds_what_it_was_given(operations):
    handle, model = PrefixHandle([5]), [5]
    for append, tokens in operations:
        if append:
            handle.extend(tokens)
            model += tokens
        elif tokens:
            handle.sync(tokens)
            model = list(tokens)
        assert list(handle.tokens) == model
        assert len(handle) == len(model)
