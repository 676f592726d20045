"""Promises about one answer: its form, its numbers, and what padding means in it."""

from __future__ import annotations

import torch
from torch import Tensor

from guided_decode.scorer import Scorer, Scores
from guided_decode.stats import ScorerStats
from guided_decode.testing.bench import Bench
from guided_decode.testing.promise import Broken

TERMINAL_RULES = ("baseline", "reward", "critic", "included")


def protocol(bench: Bench) -> None:
    """It has what `guided_decode.Scorer` has, of the right kinds."""
    scorer = bench.scorer
    wanted = sorted({*Scorer.__annotations__, *(n for n in vars(Scorer) if not n.startswith("_"))})
    missing = [name for name in wanted if not hasattr(scorer, name)]
    if missing:
        raise Broken(f"{type(scorer).__name__} has no {', '.join(missing)}")
    if not isinstance(scorer.vocab_size, int) or scorer.vocab_size < 1:
        raise Broken(f"vocab_size={scorer.vocab_size!r}, where a number of tokens is due")
    if scorer.terminal not in TERMINAL_RULES:
        raise Broken(f"terminal={scorer.terminal!r}, where one of {', '.join(TERMINAL_RULES)} is "
                     "due")  # fmt: skip
    if not isinstance(scorer.stats, ScorerStats):
        raise Broken(f"stats is a {type(scorer.stats).__name__}, where a ScorerStats is due")


def form(bench: Bench) -> None:
    """Two float32 tensors, [rows, k] and [rows], without a gradient."""
    prefixes, candidates = bench.rows(3, 9, 5), bench.candidates(3)
    answer = bench.scorer.score(prefixes, candidates)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise Broken(f"a {type(answer).__name__}, where two tensors are due, as of Scores")
    for name, given, shape in zip(("values", "baseline"), answer, ([3, 4], [3]), strict=True):
        if not isinstance(given, Tensor):
            raise Broken(f"{name} are a {type(given).__name__}, where a tensor is due")
        if list(given.shape) != shape or given.dtype != torch.float32:
            raise Broken(f"{name} are {given.dtype} {list(given.shape)}, where torch.float32 "
                         f"{shape} is due")  # fmt: skip
        if given.requires_grad:
            raise Broken(f"{name} hang on a graph of gradients: score under torch.no_grad()")


def finite(bench: Bench) -> None:
    """A number for every candidate, and for every prefix."""
    prefixes, candidates = bench.rows(2, 7, 21, bench.longest), bench.candidates(4)
    for name, given in zip(("values", "baseline"), bench.ask(prefixes, candidates), strict=True):
        odd = (~given.isfinite()).nonzero()
        if len(odd):
            first = odd[0].tolist()
            raise Broken(f"{name} of row {first[0]}: {given[tuple(first)]}, {len(odd)} of "
                         f"{given.numel()}", odd[:, 0].unique().tolist())  # fmt: skip


def padding(bench: Bench) -> None:
    """NaN at -1, wherever it stands, and the same numbers around it as without it."""
    prefixes, own = bench.rows(4, 11, 6), bench.candidates(3, 2)
    padded = torch.full((3, 5), -1)
    padded[0, 1:3], padded[1, [0, 4]] = own[0], own[1]
    got = bench.ask(prefixes, padded)
    odd = ((padded < 0) & ~got.values.isnan()).nonzero()
    if len(odd):
        row, column = odd[0].tolist()
        raise Broken(f"{got.values[row, column]:.6g} in row {row} at a -1", odd[:, 0].tolist())
    bare = bench.ask(prefixes, own)
    values = torch.full_like(got.values, torch.nan)
    values[0, 1:3], values[1, [0, 4]] = bare.values[0], bare.values[1]
    bench.same(got, Scores(values, bare.baseline), ("with padding", "without"), padded)


def nothing(bench: Bench) -> None:
    """Rows without candidates have a baseline; no rows are an empty answer."""
    prefixes, candidates = bench.rows(5, 8), bench.candidates(2)
    empty = bench.ask(prefixes, candidates[:, :0])
    full = bench.ask(prefixes, candidates)
    bench.same(Scores(full.values, empty.baseline), full, ("without candidates", "with four"))
    values, baseline = bench.scorer.score([], candidates[:0])
    if list(values.shape) != [0, 4] or list(baseline.shape) != [0]:
        raise Broken(f"shapes {list(values.shape)} and {list(baseline.shape)} for no rows, where "
                     "[0, 4] and [0] are due")  # fmt: skip


def counts(bench: Bench) -> None:
    """`stats.rows_scored` counts the rows."""
    before = bench.scorer.stats.rows_scored
    bench.ask(bench.rows(5, 8, 2), bench.candidates(3))
    counted = bench.scorer.stats.rows_scored - before
    if counted != 3:
        raise Broken(f"stats.rows_scored grew by {counted} for 3 rows: "
                     "stats.add(rows_scored=len(prefixes))")  # fmt: skip
