"""Promises about many calls: the answer depends on the arguments alone."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Scores
from guided_decode.testing.bench import Bench, ids_of, stacked
from guided_decode.testing.promise import Broken


def cached(bench: Bench) -> None:
    """What was asked before changes no answer: as in decoding, then again, then by one that
    remembers nothing."""
    stems, steps, candidates = bench.rows(7, 12), 6, bench.candidates(2)
    asked: list[list[list[int]]] = []
    first: list[Scores] = []
    for step in range(steps):
        prefixes = [stem + candidates[i, :1].tolist() * step for i, stem in enumerate(stems)]
        asked.append(prefixes)
        first.append(bench.ask(prefixes, candidates))
    for prefixes, before in zip(reversed(asked), reversed(first), strict=True):
        now = bench.ask(prefixes, candidates)
        bench.same(now, before, ("after longer ones", "at first"), candidates)
    # The longest first: the shorter ones leave it nothing to compute.
    for prefixes, before in zip(reversed(asked), reversed(first), strict=True):
        cold = bench.cold(prefixes, candidates)
        if cold is not None:
            bench.same(before, cold, ("remembering", "afresh"), candidates)


def repeats(bench: Bench) -> None:
    """One call twice, and a candidate twice in a row."""
    prefixes, own = bench.rows(6, 13), bench.candidates(2)
    first, second = (bench.ask(prefixes, own) for _ in range(2))
    bench.same(second, first, ("the second time", "the first time"), own)
    places = torch.tensor([2, 0, 2, 1, 0])
    twice = bench.ask(prefixes, own[:, places])
    bench.same(twice, Scores(first.values[:, places], first.baseline),
               ("where one came twice", "otherwise"), own[:, places])  # fmt: skip


def batch(bench: Bench) -> None:
    """Rows together and rows alone."""
    prefixes, candidates = bench.rows(4, 17, 9, bench.longest), bench.candidates(4)
    together = bench.ask(prefixes, candidates)
    others, other = bench.rows(4, 17, 9, bench.longest), bench.candidates(4)
    # Those that were never asked together, too.
    alone = bench.each_alone(others, other)
    bench.same(together, bench.each_alone(prefixes, candidates), ("in a batch", "alone"),
               candidates)  # fmt: skip
    bench.same(bench.ask(others, other), alone, ("in a batch", "alone"), other)


def row_order(bench: Bench) -> None:
    """The same rows in another order."""
    prefixes, candidates = bench.rows(15, 3, 8, 11), bench.candidates(4)
    straight = bench.ask(prefixes, candidates)
    order = [2, 0, 3, 1]
    got = bench.ask([prefixes[i] for i in order], candidates[order])
    expected = Scores(straight.values[order], straight.baseline[order])
    bench.same(got, expected, ("in another order", "in the first order"), candidates[order])


def candidate_order(bench: Bench) -> None:
    """The same candidates in another order, and fewer of them."""
    prefixes, candidates = bench.rows(10, 5), bench.candidates(2)
    straight = bench.ask(prefixes, candidates)
    for order in ([3, 1, 0, 2], [2, 1]):
        got = bench.ask(prefixes, candidates[:, order])
        expected = Scores(straight.values[:, order], straight.baseline)
        bench.same(got, expected, ("among others", "at first"), candidates[:, order])


def forks(bench: Bench) -> None:
    """Continuations of one prefix, in one batch and in any order of calls."""
    stem, tokens = bench.row(14), bench.tokens(6)
    tails = [tokens[:1], tokens[1:2], [], tokens[2:4], [tokens[2], tokens[4]]]
    prefixes: list[list[int]] = [[*stem, *tail] for tail in tails]
    candidates = torch.tensor([tokens[:4]] * len(prefixes))
    one_by_one = bench.each_alone(prefixes, candidates)
    together = bench.ask(prefixes, candidates)
    bench.same(together, one_by_one, ("as siblings of a batch", "alone"), candidates)
    # A cache that takes one fork for another answers by who came first.
    backwards = [
        bench.cold([prefix], row[None])
        for prefix, row in zip(reversed(prefixes), candidates, strict=True)
    ]
    answers = [each for each in reversed(backwards) if each is not None]
    if answers:
        bench.same(one_by_one, stacked(answers), ("asked in this order", "afresh and backwards"),
                   candidates)  # fmt: skip


def arguments(bench: Bench) -> None:
    """What is the caller's stays so, and answers are not read again."""
    prefix, handle = bench.row(9), PrefixHandle(bench.row(4))
    candidates = bench.candidates(2)
    before = ids_of(prefix), ids_of(handle), candidates.clone()
    first = bench.scorer.score([prefix, handle], candidates)
    if (ids_of(prefix), ids_of(handle)) != before[:2] or not torch.equal(candidates, before[2]):
        raise Broken("score() wrote to its prefixes or candidates")
    kept = bench.ask([prefix, handle], candidates)
    _spoil(first[0])
    _spoil(first[1])
    bench.same(bench.ask([prefix, handle], candidates), kept,
               ("after its last answer was written to", "before"), candidates)  # fmt: skip


def _spoil(answer: Tensor) -> None:
    # Views that cannot be written to are safe from the caller.
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        answer.fill_(-77.0)


def modes(bench: Bench) -> None:
    """Inference mode comes and goes: engines score in it, and outside it."""
    stem, candidates = bench.row(8), bench.candidates(1)
    grown = stem
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            grown = [*grown, *bench.tokens(2)]
            scores = bench.scorer.score([grown], candidates)
            if scores[0].requires_grad:
                raise Broken("values hang on a graph of gradients")
