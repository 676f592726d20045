"""Promises about prefixes and handles: each is the ids that it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_decode.prefix import PrefixHandle
from guided_decode.testing.bench import Bench, ids_of

_FORMS = (list, tuple, np.array, torch.tensor, PrefixHandle)
_AS_HANDLE = ("by a handle", "by a list")


def forms(bench: Bench) -> None:
    """Lists, tuples, arrays, tensors and handles."""
    prefixes, candidates = bench.rows(22, 3), bench.candidates(2)
    expected = bench.ask(prefixes, candidates)
    for form in _FORMS:
        given: list[Any] = [form(prefix) for prefix in prefixes]
        got = bench.ask(given, candidates)
        bench.same(got, expected, (f"by {form.__name__}", "by list"), candidates)


def handles(bench: Bench) -> None:
    """A handle that grows, is cut short, changes, and serves two rows."""
    handle, candidates = PrefixHandle(bench.row(6)), bench.candidates(2)
    _as_lists(bench, [handle, handle], candidates)
    for token in bench.tokens(3):
        handle.append(token)
        _as_lists(bench, [handle, handle], candidates)
    handle.extend(bench.row(5))
    _as_lists(bench, [handle, handle], candidates)
    grown = ids_of(handle)
    # Shorter; as long as it was, and another; and as it was before.
    for tokens in (grown[:5], bench.row(5), [*bench.row(2), *grown[2:]], grown):
        handle.sync(tokens)
        _as_lists(bench, [handle, handle], candidates)


def new_handles(bench: Bench) -> None:
    """A handle that is gone leaves nothing to the next one at its address."""
    candidates = bench.candidates(1)
    rows = bench.rows(*[19] * 12)
    # By lists first: in the loop nothing else may take the place of a handle that is gone.
    expected = [bench.ask([row], candidates) for row in rows]
    for row, each in zip(rows, expected, strict=True):
        got = bench.ask([PrefixHandle(row)], candidates)
        bench.same(got, each, _AS_HANDLE, candidates)


def eviction(bench: Bench) -> None:
    """Handles go on after much else was asked, whatever became of what was remembered of them."""
    lasting = [PrefixHandle(row) for row in bench.rows(17, 12)]
    candidates = bench.candidates(2)
    for round in range(3):
        bench.ask(lasting, candidates)
        for _ in range(4):
            others = [PrefixHandle(row) for row in bench.rows(*[bench.longest] * 8)]
            bench.ask(others, bench.candidates(8))
        for handle in lasting:
            handle.extend(bench.row(1 + round))
        _as_lists(bench, lasting, candidates)


def _as_lists(bench: Bench, prefixes: list[Any], candidates: Tensor) -> None:
    got = bench.ask(prefixes, candidates)
    plain = bench.ask([ids_of(prefix) for prefix in prefixes], candidates)
    bench.same(got, plain, _AS_HANDLE, candidates)
