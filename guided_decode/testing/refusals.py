"""Promises about what cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode.testing.bench import Bench
from guided_decode.testing.promise import Broken


def refuses(bench: Bench) -> None:
    """ValueError for what is no row, and the next call as if nothing had been."""
    good, candidates = bench.row(7), bench.candidates(1)
    before = bench.ask([good], candidates)
    beyond, two = bench.scorer.vocab_size, torch.cat([candidates, candidates])
    cases: list[tuple[str, Sequence[Any], Tensor]] = [
        ("an empty prefix", [good, []], two),
        (f"token {beyond} in a prefix", [good, [*good, beyond]], two),
        ("token -1 in a prefix", [good, [*good, -1]], two),
        (f"candidate {beyond}", [good], torch.tensor([[*candidates[0, 1:].tolist(), beyond]])),
        ("candidates of two rows for one prefix", [good], two),
        ("candidates of floats", [good], candidates.float()),
    ]
    for what, prefixes, asked in cases:
        try:
            bench.scorer.score(prefixes, asked)
        except ValueError:
            pass
        except Exception as error:
            raise Broken(f"{type(error).__name__} ({error}) for {what}, where ValueError is "
                         "due") from error  # fmt: skip
        else:
            raise Broken(f"an answer to {what}, where ValueError is due")
        now = bench.ask([good], candidates)
        bench.same(now, before, (f"after {what} was refused", "before"), candidates)


def refusal(bench: Bench) -> None:
    """`refusal` says beforehand what `score` would refuse: engines leave such rows unguided."""
    good = bench.row(7)
    said = bench.scorer.refusal(good, 4)
    if said is not None:
        raise Broken(f"refusal() says {said!r} of a row that score() answers")
    bench.ask([good], bench.candidates(1))
    for what, row in (
        ("an empty prefix", []),
        ("a token outside the vocabulary", [*good, bench.scorer.vocab_size]),
    ):
        said = bench.scorer.refusal(row, 4)
        if not isinstance(said, str) or not said:
            raise Broken(f"refusal() says {said!r} of {what}, where words are due")
