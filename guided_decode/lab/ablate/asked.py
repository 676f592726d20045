"""What guidance asks a scorer about, counted row by row as searches count: distinct tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import LogProbs, Prefix, Scorer, Scores, TerminalRule


class Counts:
    """The prefixes of each row, known by its handle, and the candidates that came after them.

    A row's prefixes are the beginnings of one history, so that the longest is all of them. Neither
    a cache nor what stands beside a row in its block changes what it is counted.
    """

    def __init__(self) -> None:
        # By handle and length of the prefix; the handle is kept, and so its id stays its own.
        self._rows: dict[int, tuple[PrefixHandle, dict[int, set[int]]]] = {}

    def add(self, prefixes: Sequence[Prefix], candidates: Tensor | None) -> None:
        """Counts a call. candidates: int64 [rows, k], padded with -1; None: they cost nothing."""
        listed = [[]] * len(prefixes) if candidates is None else candidates.tolist()
        for handle, own in zip(prefixes, listed, strict=True):
            assert isinstance(handle, PrefixHandle)
            _, asked = self._rows.setdefault(id(handle), (handle, {}))
            asked.setdefault(len(handle), set()).update(own)

    def of_rows(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Distinct tokens of each row: nodes of a tree of its own, the prompt's among them.

        rows: each row's prompt and what came after it, as far as its handle goes or further.
        """
        # Rows with one history have asked the same.
        known = {tuple(h.tokens.tolist()): _nodes(h, asked) for h, asked in self._rows.values()}
        lengths = sorted({len(own) for own in known})
        return [
            next((known[own] for n in lengths if (own := tuple(row[:n])) in known), 0)
            for row in rows
        ]


def _nodes(handle: PrefixHandle, asked: Mapping[int, set[int]]) -> int:
    deepest, history = max(asked), handle.tokens
    beside = 0
    for length, candidates in asked.items():
        gone_on = {int(history[length])} if length < deepest else set()
        beside += len(candidates - gone_on - {-1})
    return deepest + beside


class CountedReference:
    """A reference whose prefixes are counted: one forward of each has all candidates."""

    def __init__(self, reference: LogProbs, counts: Counts) -> None:
        self._reference, self._counts = reference, counts

    def log_probs(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Tensor:
        """As of the reference."""
        self._counts.add(prefixes, None)
        return self._reference.log_probs(prefixes, candidates)

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """As of the reference."""
        return self._reference.refusal(prefix, candidates)


class CountedScorer:
    """A scorer whose prefixes and candidates are counted; those of its reward model with them."""

    def __init__(self, scorer: Scorer, counts: Counts, referred: Counts) -> None:
        """
        Args:
            scorer: what is asked.
            counts, referred: of what it reads, and of what its reference reads.
        """
        self._scorer, self._counts, self.stats = scorer, counts, scorer.stats
        own = scorer.reward
        self.reward: Scorer | None = None if own is None else CountedScorer(own, counts, referred)
        reference = scorer.reference
        self.reference: LogProbs | None = (
            None if reference is None else CountedReference(reference, referred)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    @property
    def vocab_size(self) -> int:
        """As of the scorer."""
        return self._scorer.vocab_size

    @property
    def terminal(self) -> TerminalRule:
        """As of the scorer."""
        return self._scorer.terminal

    @property
    def bos_token_id(self) -> int | None:
        """As of the scorer."""
        return self._scorer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """As of the scorer."""
        return self._scorer.eos_token_id

    @property
    def scores_vocabulary(self) -> bool:
        """As of the scorer."""
        return self._scorer.scores_vocabulary

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """As of the scorer. A whole vocabulary comes with its prefix: nobody reads its tokens."""
        whole = self.scores_vocabulary and candidates.shape[1] >= self.vocab_size
        self._counts.add(prefixes, None if whole else candidates)
        return self._scorer.score(prefixes, candidates)

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """As of the scorer."""
        return self._scorer.refusal(prefix, candidates)
