"""What promises are tried with: rows that nothing asked before, answers, and their comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Prefix, Scorer, Scores
from guided_decode.testing.promise import Broken

# Differences that an error shows.
_SHOWN = 3


class Bench:
    """The scorer on trial.

    fresh: makes it anew, without what it remembers. token_ids: those that rows are made of; None
    takes the vocabulary without BOS and EOS. longest: tokens of a row. atol, rtol: how far two
    answers may lie apart.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        fresh: Callable[[], Scorer] | None,
        token_ids: Sequence[int] | None,
        longest: int,
        atol: float,
        rtol: float,
        seed: str,
    ) -> None:
        self.scorer = scorer
        self._fresh = fresh
        self._other: Scorer | None = None
        self._token_ids = token_ids
        self.longest = longest
        self._atol, self._rtol = atol, rtol
        self._random = random.Random(seed)

    @property
    def token_ids(self) -> Sequence[int]:
        if self._token_ids is not None:
            return self._token_ids
        special = {self.scorer.bos_token_id, self.scorer.eos_token_id}
        most = self.scorer.vocab_size
        # All of a large vocabulary are more than any check asks for.
        return [i for i in range(min(most, 5_000)) if i not in special]

    def row(self, length: int) -> list[int]:
        """Random ids; of more than a few tokens no two rows are alike."""
        return self._random.choices(self.token_ids, k=max(1, min(length, self.longest)))

    def rows(self, *lengths: int) -> list[list[int]]:
        return [self.row(length) for length in lengths]

    def tokens(self, count: int) -> list[int]:
        """Distinct ids."""
        return self._random.sample(self.token_ids, min(count, len(self.token_ids)))

    def candidates(self, rows: int, count: int = 4) -> Tensor:
        """Distinct candidates for each row, int64 [rows, count]."""
        return torch.tensor([self.tokens(count) for _ in range(rows)])

    def ask(
        self, prefixes: Sequence[Prefix], candidates: Tensor, scorer: Scorer | None = None
    ) -> Scores:
        """The answer as float64 on the CPU; of any shape that has the right numbers in it."""
        asked = self.scorer if scorer is None else scorer
        values, baseline = asked.score(prefixes, candidates)
        given = values.numel(), baseline.numel()
        if given != (candidates.numel(), len(prefixes)):
            raise Broken(f"{given[0]} values and {given[1]} baselines for candidates "
                         f"{list(candidates.shape)} after {len(prefixes)} prefixes")  # fmt: skip
        return Scores(
            _plain(values).reshape(candidates.shape), _plain(baseline).reshape(len(prefixes))
        )

    def alone(self, prefix: Prefix, candidates: Tensor) -> Scores:
        """The answer to one row, candidates [k]."""
        return self.ask([prefix], candidates[None])

    def each_alone(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """Answers to rows that were asked one after the other."""
        own = [self.alone(*row) for row in zip(prefixes, candidates, strict=True)]
        return stacked(own)

    def cold(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores | None:
        """The answer without what was remembered; None where nothing makes the scorer forget."""
        if self._fresh is not None:
            self._other = self._fresh() if self._other is None else self._other
            return self.ask(prefixes, candidates, self._other)
        clear = getattr(getattr(self.scorer, "cache", None), "clear", None)
        if not callable(clear):
            return None
        clear()
        return self.ask(prefixes, candidates)

    def same(
        self,
        got: Scores,
        expected: Scores,
        what: tuple[str, str],
        candidates: Tensor | None = None,
    ) -> None:
        """Raises Broken: two answers differ; names the rows and shows the first figures.

        what: words for either answer. candidates: of the rows, to name them.
        """
        found: list[tuple[int, str]] = []
        for name, one, other in zip(("values", "baseline"), got, expected, strict=True):
            for place in (~self._close(one, other)).nonzero().tolist():
                token = ""
                if name == "values" and candidates is not None:
                    token = f", candidate {int(candidates[tuple(place)])}"
                figures = f"{one[tuple(place)]:.6g} {what[0]}, {other[tuple(place)]:.6g} {what[1]}"
                found.append((place[0], f"{name} of row {place[0]}{token}: {figures}"))
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            rows = sorted({row for row, _ in found})
            raise Broken("; ".join(text for _, text in found[:_SHOWN]) + more, rows)

    def _close(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.isclose(one, other, rtol=self._rtol, atol=self._atol, equal_nan=True)


def stacked(answers: Sequence[Scores]) -> Scores:
    """Answers to rows of as many candidates, as one answer."""
    return Scores(
        torch.cat([each.values for each in answers]), torch.cat([each.baseline for each in answers])
    )


def ids_of(prefix: Any) -> list[int]:
    """A prefix as a list."""
    tokens = prefix.tokens if isinstance(prefix, PrefixHandle) else prefix
    return [int(token) for token in tokens]


def _plain(tensor: Tensor) -> Tensor:
    # A copy: an answer may be a view of what the scorer goes on writing to.
    return tensor.detach().to("cpu", torch.float64, copy=True)
