"""Rows that go on together, as arrays: any schedule reads the right slots, at the same cost."""

import contextlib
import copy
import gc
import random
import threading
import weakref

import pytest
import torch

from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.cache import riders
from guided_decode.cache.blocks import TailBlocks
from guided_decode.guidance import step as guidance_step
from guided_decode.scoring import critic as critic_module
from tests.cache.reading_critic import ReadingCritic, value

# Few tokens of many, so that rows meet, or none.
VOCABS = (6, 60, 60)


class Rows:
    """Rows that decode together, with what an engine and a search do to them in between."""

    def __init__(self, seed, *, rides=True, cache_tokens=None):
        self.random = random.Random(seed)
        self.vocab = self.random.choice(VOCABS)
        self.k = self.random.choice([1, 2, 5, 9])
        # Now and then a step asks for more: rows that fitted the cache together do no longer.
        self.widest = self.random.choice([self.k, 14, 20])
        capacity = self.random.choice([60, 80, 100, 200, 1000, 20000])
        limit = self.random.choice([3, 17, 8192])
        self.skip = self.random.choice([None, 2])
        capacity = capacity if cache_tokens is None else cache_tokens
        self.critic = ReadingCritic(capacity, limit, skip_token=self.skip)
        self.critic.cache.rides = rides
        # Rows that nearly fill the cache, or go beyond it.
        self.longest = min(capacity - self.widest, self.random.choice([capacity // 3, 150]))
        self.rows = []
        for _ in range(self.random.choice([1, 2, 4, 8])):
            self.begin(self.draw(1, 20))

    def draw(self, least, most):
        return self.random.choices(range(self.vocab), k=self.random.randint(least, most))

    def begin(self, tokens, last=()):
        self.rows.append([list(tokens), PrefixHandle(tokens), list(last)])

    def step(self):
        turns = [self.start, self.fork, self.rewind, self.leave, self.grow,
                 self.critic.cache.clear, self.critic.cache.drop_candidates]  # fmt: skip
        if self.random.random() < 0.12:
            self.random.choice(turns)()
        for row in self.rows:
            self.choose(row)
        self.score()

    def start(self):
        self.begin(self.draw(1, 20))

    def fork(self):
        tokens, _, last = self.random.choice(self.rows)
        self.begin(tokens, last)

    def rewind(self):
        row = self.random.choice(self.rows)
        row[0] = row[0][: max(1, len(row[0]) - self.random.randint(1, 30))]
        row[1].sync(row[0])

    def leave(self):
        if len(self.rows) > 1:
            self.rows.pop(self.random.randrange(len(self.rows)))

    def grow(self):
        row, tokens = self.random.choice(self.rows), self.draw(1, 4)
        row[0] += tokens
        row[1].extend(tokens)

    def choose(self, row):
        """Goes on with one of its last candidates, now and then with another token."""
        if len(row[0]) >= self.longest:
            row[0], row[2] = row[0][:5], []
            row[1].sync(row[0])
        if row[2] and self.random.random() < 0.97:
            other = self.random.random() < 0.03
            token = self.random.randrange(self.vocab) if other else self.random.choice(row[2])
            row[0].append(token)
            row[1].append(token)

    def asked(self):
        order, turn = list(range(len(self.rows))), self.random.random()
        if turn < 0.1:
            self.random.shuffle(order)
        elif turn < 0.15:
            order = self.random.choices(order, k=len(order))
        elif turn < 0.2:
            order = order[: self.random.randint(1, len(order))]
        return order

    def candidates(self, k):
        """Distinct or not, all or some, padded anywhere."""
        count = k if self.random.random() < 0.8 else self.random.randint(0, k)
        chosen = self.random.sample(range(self.vocab), min(count, self.vocab))
        if self.random.random() < 0.03:
            chosen = self.random.choices(range(self.vocab), k=count)
        chosen += [-1] * (k - len(chosen))
        if self.random.random() < 0.2:
            self.random.shuffle(chosen)
        return chosen

    def score(self):
        asked = self.asked()
        k = self.k if self.random.random() < 0.8 else self.random.randint(1, self.widest)
        chosen = [self.candidates(k) for _ in asked]
        listed = [self.random.random() < 0.03 for _ in asked]
        prefixes = [
            list(self.rows[n][0]) if plain else self.rows[n][1]
            for n, plain in zip(asked, listed, strict=True)
        ]
        with self.expecting(prefixes):
            if self.random.random() < 0.03:
                self.random.choice([self.critic.cache.clear, self.critic.cache.drop_candidates])()
            values, baseline = self.critic.score(prefixes, torch.tensor(chosen))
        if self.random.random() < 0.3:
            self.check()
        for n, given, got, own in zip(
            asked, chosen, values.tolist(), baseline.tolist(), strict=True
        ):
            prefix = self.seen(self.rows[n][0])
            assert own == pytest.approx(value(prefix), abs=1e-6)
            for token, found in zip(given, got, strict=True):
                wanted = value([*prefix, token]) if token >= 0 else float("nan")
                assert found == pytest.approx(wanted, abs=1e-6, nan_ok=True)
            self.rows[n][2] = [token for token in given if token >= 0]

    def expecting(self, prefixes):
        """Now and then these are looked up before, with or without rows that are not asked for."""
        turn, others = self.random.random(), [row[1] for row in self.rows]
        if turn < 0.4:
            return contextlib.nullcontext()
        if turn < 0.7:
            return self.critic.expecting(prefixes)
        every = list({id(each): each for each in [*prefixes, *others]}.values())
        self.random.shuffle(every)
        return self.critic.expecting(every)

    def seen(self, tokens):
        dropped = self.skip is not None and len(tokens) > 1 and tokens[0] == self.skip
        return tokens[dropped:]

    def check(self):
        cache = self.critic.cache
        cache.check()
        assert cache.pinned == 0
        assert cache.free_slots + cache.cached_tokens == cache.capacity


def run(seeds, steps=60, **options):
    """Counters of all the schedules together, and how many rows rode."""
    counted, ridden = {}, 0
    for seed in seeds:
        rows = Rows(seed, **options)
        for _ in range(steps):
            rows.step()
        for name, count in rows.critic.stats.as_dict().items():
            if not name.endswith("seconds"):
                counted[name] = counted.get(name, 0) + count
        ridden += rows.critic.cache.ridden
    return counted, ridden


def test_any_schedule_reads_the_right_slots():
    counted, ridden = run(range(6))
    assert ridden > 100
    assert counted["evictions"] > 1000


def test_the_same_schedules_row_by_row():
    assert run(range(2), rides=False)[1] == 0


def test_what_is_forwarded_and_found_is_the_same():
    together, ridden = run(range(100, 103), cache_tokens=20000)
    alone, _ = run(range(100, 103), cache_tokens=20000, rides=False)
    assert ridden > 150
    assert together == alone


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_schedules_read_the_right_slots():
    assert run(range(1000, 1200), steps=120)[1] > 10_000


# What an engine's rows do.


def decoding(rows, *, cache_tokens=20000, prompt=20):
    critic = ReadingCritic(cache_tokens)
    handles = [PrefixHandle([3 + i, *range(3, 2 + prompt)]) for i in range(rows)]

    def step(k=4):
        first = 3 + len(handles[0]) % 50
        candidates = torch.arange(first, first + k).repeat(len(handles), 1)
        values, baseline = critic.score(handles, candidates)
        for i, handle in enumerate(handles):
            assert baseline[i].item() == pytest.approx(value(handle.tokens), abs=1e-6)
            assert values[i, 0].item() == pytest.approx(value([*handle.tokens, first]), abs=1e-6)
            handle.append(first + i % k)

    return critic, handles, step


def test_rows_ride_from_the_third_step_on_and_their_tails_enter_the_tree():
    critic, _, step = decoding(3)
    for number in range(3 * riders.TAIL):
        before = critic.cache.ridden
        step()
        assert critic.cache.ridden - before == (3 if number >= 2 else 0)
        critic.cache.check()
    longest = critic.cache.tree.riders.count.max()
    assert longest < riders.TAIL - 1
    assert critic.stats.prefix_tokens == 3 * 20
    assert critic.stats.candidate_tokens == 3 * 3 * riders.TAIL * 4


@pytest.mark.parametrize("k", [1, 3])
def test_tails_leave_no_candidates_in_the_tree_but_those_that_were_not_chosen(k):
    critic, _, step = decoding(2)
    for _ in range(100):
        step(k)
    # Each row came to its leaf's end the tree's way, twice, and a block was left empty there.
    assert sum(block.is_empty for _, _, block in critic.cache.tree._blocks) <= 4
    assert critic.cache.cached_tokens == 2 * (20 + 100 * k)


def test_a_prefix_that_a_rider_went_through_is_found_by_another():
    critic, handles, step = decoding(1)
    for _ in range(12):
        step()
    critic.stats.reset()
    critic.score([list(handles[0].tokens[:-1])], torch.tensor([[60]]))
    assert (critic.stats.prefix_tokens, critic.stats.candidate_tokens) == (0, 1)
    step()
    critic.cache.check()


def test_a_handle_that_is_gone_leaves_what_it_added():
    critic, handles, step = decoding(2)
    for _ in range(12):
        step()
    tokens = list(handles[0].tokens[:-1])
    handles.pop(0)
    assert len(critic.cache.tree.riders) == 2
    step()
    assert len(critic.cache.tree.riders) == 1
    critic.stats.reset()
    critic.score([tokens], torch.tensor([[60]]))
    assert critic.stats.prefix_tokens == 0


def test_a_scorer_that_is_gone_holds_no_memory_whoever_keeps_its_handles():
    critic, handles, step = decoding(2)
    for _ in range(6):
        step()
    assert len(critic.cache.tree.riders) == 2
    memory = weakref.ref(critic.cache.pool.keys[0])
    tree = weakref.ref(critic.cache.tree.nodes()[0].slots.view.base)
    gc.collect()
    gc.disable()
    try:
        del critic, step
        assert memory() is None
    finally:
        gc.enable()
    # Nodes point at each other, and nobody at them.
    gc.collect()
    assert tree() is None
    assert len(handles) == 2


def test_a_rider_that_nobody_asks_for_makes_room_in_the_end():
    critic, handles, step = decoding(2, cache_tokens=140)
    for _ in range(10):
        step()
    waiting = handles.pop(0)
    for _ in range(40):
        step()
        critic.cache.check()
    assert critic.stats.evictions > 0
    handles.append(waiting)
    step()
    critic.cache.check()


@pytest.mark.parametrize("cache_tokens", range(76, 100, 3))
def test_rows_that_cannot_ride_for_want_of_room_go_the_trees_way(cache_tokens):
    """Nothing that was written of them for the ride stands beside what the tree writes."""
    critic, _, step = decoding(3, cache_tokens=cache_tokens)
    ridden = []
    for number in range(16):
        before = critic.cache.ridden
        step(14 if number % 5 == 4 else 2)
        critic.cache.check()
        ridden.append(critic.cache.ridden - before)
    assert ridden[3:5] == [3, 0]


def test_a_handle_that_comes_twice_goes_the_trees_way_and_the_others_ride():
    critic, handles, step = decoding(4)
    for _ in range(4):
        step()
    before = critic.cache.ridden
    first = 3 + len(handles[0]) % 50
    asked = [handles[i] for i in (0, 1, 2, 1, 3)]
    candidates = [[first, 60], [60, 60], [first, 60], [first, 60], [first, 60]]
    values, _ = critic.score(asked, torch.tensor(candidates))
    assert critic.cache.ridden - before == 3
    for got, handle, chosen in zip(values.tolist(), asked, candidates, strict=True):
        expected = [value([*handle.tokens, token]) for token in chosen]
        assert got == pytest.approx(expected, abs=1e-6)
    critic.cache.check()


def test_a_copy_of_a_cache_rides_as_the_original_does():
    critic, _, _ = decoding(1)
    assert copy.copy(critic.cache).rides
    critic.cache.rides = False
    assert not copy.deepcopy(critic.cache).rides


def test_more_rows_than_may_ride_are_scored_all_the_same(monkeypatch):
    monkeypatch.setattr(riders, "_MOST_RIDERS", 8)
    critic, _, step = decoding(11)
    for _ in range(6):
        step()
    assert critic.cache.ridden == 8 * 4


def test_candidates_that_are_too_many_for_riders_go_the_trees_way():
    critic, handles, _ = decoding(2)
    wide = torch.randperm(60)[:40].repeat(2, 2)[:, :70]
    for _ in range(4):
        values, _ = critic.score(handles, torch.cat([wide[:, :40], torch.full((2, 20), -1)], 1))
        for handle in handles:
            handle.append(int(wide[0, 3]))
    assert values.shape == (2, 60)
    assert critic.cache.ridden == 4


# What is looked up before the candidates are known.


def look_ups(monkeypatch):
    """How many prefixes each look-up had, from now on."""
    found, plain = [], critic_module.find_riders

    def counted(cache, prefixes, skip_token):
        found.append(len(prefixes))
        return plain(cache, prefixes, skip_token)

    monkeypatch.setattr(critic_module, "find_riders", counted)
    return found


def test_a_step_looks_its_prefixes_up_before_it_waits_for_the_logits(monkeypatch):
    critic, handles, step = decoding(3)
    for _ in range(5):
        step()
    found, waited = look_ups(monkeypatch), []
    plain = guidance_step._on_host

    def on_host(*given, **options):
        waited.append(list(found))
        return plain(*given, **options)

    monkeypatch.setattr(guidance_step, "_on_host", on_host)
    before = critic.cache.ridden
    guidance_step.guide_rows(critic, torch.randn(3, 61), handles, GuidanceConfig(top_k=4))
    assert waited == [[3]]
    assert found == [3]
    assert critic.cache.ridden - before == 3


def test_of_rows_that_a_gate_lets_pass_the_others_are_not_looked_up_again(monkeypatch):
    critic, handles, step = decoding(3)
    for _ in range(5):
        step()
    found, before = look_ups(monkeypatch), critic.cache.ridden
    logits = torch.zeros(3, 61)
    logits[1, 7] = 50.0
    guidance_step.guide_rows(critic, logits, handles, GuidanceConfig(top_k=4, gate=0.9))
    assert found == [3]
    assert critic.cache.ridden - before == 2


def test_what_was_looked_up_holds_until_somebody_else_scores(monkeypatch):
    critic, handles, step = decoding(2)
    for _ in range(5):
        step()
    candidates = torch.tensor([[40, 41], [42, 43]])
    found = look_ups(monkeypatch)
    with critic.expecting(handles):
        critic.score(handles[:1], candidates[:1])
        assert found == [2]
        scores = critic.score(handles, candidates)
    assert found == [2, 2]
    for i, handle in enumerate(handles):
        for j, token in enumerate(candidates[i].tolist()):
            wanted = value([*handle.tokens, token])
            assert scores.values[i, j].item() == pytest.approx(wanted, abs=1e-6)
    critic.cache.check()


def test_a_handle_that_comes_once_more_than_was_expected_does_not_ride(monkeypatch):
    critic, handles, step = decoding(2)
    for _ in range(5):
        step()
    candidates = torch.tensor([[40, 41], [42, 43], [44, 45]])
    found, before = look_ups(monkeypatch), critic.cache.ridden
    with critic.expecting(handles):
        scores = critic.score([*handles, handles[0]], candidates)
    assert found == [2, 3]
    assert critic.cache.ridden - before == 1
    for i, handle in enumerate([*handles, handles[0]]):
        wanted = [value([*handle.tokens, token]) for token in candidates[i].tolist()]
        assert scores.values[i].tolist() == pytest.approx(wanted, abs=1e-6)


def test_rows_may_be_scored_in_another_order_than_they_were_expected():
    critic, handles, step = decoding(3)
    for _ in range(5):
        step()
    candidates, before = torch.tensor([[40, 41], [42, 43], [44, 45]]), critic.cache.ridden
    with critic.expecting(handles[::-1]):
        scores = critic.score(handles, candidates)
    assert critic.cache.ridden - before == 3
    for i, handle in enumerate(handles):
        wanted = [value([*handle.tokens, token]) for token in candidates[i].tolist()]
        assert scores.values[i].tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_list_that_is_changed_in_between_is_another_one():
    critic, handles, step = decoding(3)
    for _ in range(5):
        step()
    candidates, given = torch.tensor([[40, 41], [42, 43], [44, 45]]), list(handles)
    with critic.expecting(given):
        given.reverse()
        scores = critic.score(given, candidates)
    for i, handle in enumerate(given):
        wanted = [value([*handle.tokens, token]) for token in candidates[i].tolist()]
        assert scores.values[i].tolist() == pytest.approx(wanted, abs=1e-6)


def test_rows_that_nobody_expected_ride_all_the_same(monkeypatch):
    critic, handles, step = decoding(3)
    for _ in range(5):
        step()
    candidates, before = torch.tensor([[40, 41], [42, 43], [44, 45]]), critic.cache.ridden
    found = look_ups(monkeypatch)
    with critic.expecting(handles[:2]):
        critic.score(handles, candidates)
    assert found == [2, 3]
    assert critic.cache.ridden - before == 3


def test_what_was_looked_up_is_the_threads_own_and_ends_with_the_step(monkeypatch):
    critic, handles, step = decoding(2)
    for _ in range(5):
        step()
    candidates, found = torch.tensor([[40, 41], [42, 43]]), look_ups(monkeypatch)
    with critic.expecting(handles):
        other = threading.Thread(target=critic.score, args=([[3, 4]], candidates[:1]))
        other.start()
        other.join()
    assert found == [2, 1]
    critic.score(handles, candidates)
    assert found == [2, 1, 2]


def test_tails_keep_no_more_columns_than_they_have_candidates():
    critic, _, step = decoding(2)
    for k in (4, 4, 30, *[4] * 60):
        step(k)
    assert critic.cache.tree.riders.tokens.shape[2] >= 30
    widths = {
        block._tokens.shape[1]
        for node in critic.cache.tree.nodes()
        for block in node.blocks
        if isinstance(block, TailBlocks)
    }
    # The settled tail has the step of 30, too; what came after it has four, of which one was taken.
    for _ in range(60):
        step()
    narrow = {
        block._tokens.shape[1]
        for node in critic.cache.tree.nodes()
        for block in node.blocks[70:]
        if isinstance(block, TailBlocks)
    }
    assert max(widths) >= 29
    assert narrow == {3}


def test_tails_without_candidates_hold_no_memory():
    critic, _, step = decoding(1)
    for _ in range(60):
        step()
    critic.cache.drop_candidates()
    (leaf,) = (node for node in critic.cache.tree.nodes() if not node.children)
    (blocks,) = {block for block in leaf.blocks if isinstance(block, TailBlocks)}
    assert blocks.is_empty
    assert not len(blocks.slots)
    assert not blocks._tokens.nbytes
    step()
    critic.cache.check()


def test_candidates_along_a_tail_are_found_again_in_both_halves_of_a_leaf_that_is_cut():
    critic, handles, step = decoding(1)
    for _ in range(60):
        step()
    tokens = handles[0].tokens[:-1].tolist()
    critic.stats.reset()
    # Another row leaves the leaf in its middle.
    critic.score([[*tokens[:45], 61]], torch.tensor([[3]]))
    assert (critic.stats.prefix_tokens, critic.stats.candidate_tokens) == (1, 1)
    critic.stats.reset()
    for end in (30, 44, 45, 46, 60):
        first = 3 + end % 50
        values, _ = critic.score([tokens[:end]], torch.tensor([[*range(first, first + 4)]]))
        for token, found in zip(range(first, first + 4), values[0].tolist(), strict=True):
            assert found == pytest.approx(value([*tokens[:end], token]), abs=1e-6)
        critic.cache.check()
    assert (critic.stats.prefix_tokens, critic.stats.candidate_tokens) == (0, 0)
