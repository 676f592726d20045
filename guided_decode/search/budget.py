"""What a search may spend, and what it has spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from guided_decode.search.requests import Continuation, Extend, Judge, Next


class BudgetSpent(Exception):
    """Thrown into a method that asks for more than its budget has left; names the limit."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one search; None is no limit.

    policy_tokens, scorer_tokens: distinct tokens that the policy reads or writes, and that the
    judge reads: nodes of the search's tree, the prompt's among them. What a reference reads counts
    with the policy's. An engine with a prefix cache forwards no more; engines without one do.
    seconds: wall clock, from the first request.
    """

    policy_tokens: int | None = None
    scorer_tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("policy_tokens", "scorer_tokens", "seconds"):
            given = getattr(self, name)
            if given is not None and not given > 0:
                raise ValueError(f"{name}={given}: expected a number above 0, or None")


class TokenTree:
    """Distinct token sequences, as the nodes of a tree."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._children)

    def add(self, *pieces: Sequence[int]) -> int:
        """Adds the sequence that the pieces make; returns how many nodes are new."""
        before, node = len(self._children), 0
        for piece in pieces:
            for token in piece:
                node = self._children.setdefault((node, token), len(self._children) + 1)
        return len(self._children) - before

    def missing(self, *pieces: Sequence[int]) -> int:
        """How many nodes `add` would add."""
        node: int | None = 0
        known = total = 0
        for piece in pieces:
            for token in piece:
                total += 1
                node = None if node is None else self._children.get((node, token))
                known += node is not None
        return total - known


@dataclass(slots=True)
class Spent:
    """What one search has spent so far.

    generated: tokens that were drawn, each one of them, and next-token distributions that a method
    asked for in their stead. policy_tokens, scorer_tokens, seconds: as
    `Budget` counts them. calls: requests that were answered.
    """

    generated: int = 0
    policy_tokens: int = 0
    scorer_tokens: int = 0
    seconds: float = 0.0
    calls: int = 0
    _written: TokenTree = field(default_factory=TokenTree, repr=False)
    _referred: TokenTree = field(default_factory=TokenTree, repr=False)
    _judged: TokenTree = field(default_factory=TokenTree, repr=False)
    _begun: float | None = field(default=None, repr=False)

    def allowed(self, request: Extend, budget: Budget) -> list[int]:
        """The most tokens of each prefix's continuations that stay within the budget.

        Raises BudgetSpent: not one.
        """
        self._check_time(budget)
        if budget.policy_tokens is None:
            return list(request.max_tokens)
        left = budget.policy_tokens - self.policy_tokens
        left -= sum(self._written.missing(prefix) for prefix in dict.fromkeys(request.prefixes))
        most = left // max(1, request.n * len(request.prefixes))
        if most < 1:
            raise BudgetSpent("policy_tokens")
        return [min(most, own) for own in request.max_tokens]

    def check(self, request: Judge | Next, budget: Budget) -> None:
        """Raises BudgetSpent: what these texts or prefixes cost would exceed the budget."""
        self._check_time(budget)
        if isinstance(request, Next):
            self._check_next(request, budget)
            return
        if budget.scorer_tokens is None:
            return
        # Texts that share what is new count it once each here: never too little.
        wanted = sum(self._judged.missing(text.prompt, text.response) for text in request.texts)
        if self.scorer_tokens + wanted > budget.scorer_tokens:
            raise BudgetSpent("scorer_tokens")

    def _check_next(self, request: Next, budget: Budget) -> None:
        if budget.policy_tokens is None:
            return
        readers = [self._written, self._referred] if request.reference else [self._written]
        prefixes = dict.fromkeys(request.prefixes)
        wanted = sum(reader.missing(prefix) for reader in readers for prefix in prefixes)
        if self.policy_tokens + wanted > budget.policy_tokens:
            raise BudgetSpent("policy_tokens")

    def extended(self, request: Extend, answer: Sequence[Sequence[Continuation]]) -> None:
        """Counts what an Extend was answered."""
        self.calls += 1
        for prefix, continuations in zip(request.prefixes, answer, strict=True):
            self._written.add(prefix)
            for each in continuations:
                self.generated += len(each.tokens)
                self._written.add(prefix, each.tokens)
        self._count_policy()

    def continued(self, request: Next) -> None:
        """Counts what a Next was answered."""
        self.calls += 1
        self.generated += len(request.prefixes)
        for prefix in request.prefixes:
            self._written.add(prefix)
            if request.reference:
                self._referred.add(prefix)
        self._count_policy()

    def _count_policy(self) -> None:
        self.policy_tokens = len(self._written) + len(self._referred)
        self._clock()

    def judged(self, request: Judge) -> None:
        """Counts what was judged."""
        self.calls += 1
        for text in request.texts:
            self._judged.add(text.prompt, text.response)
        self.scorer_tokens = len(self._judged)
        self._clock()

    def begin(self) -> None:
        """Starts the clock, at the first request."""
        if self._begun is None:
            self._begun = time.perf_counter()

    def _clock(self) -> None:
        assert self._begun is not None
        self.seconds = time.perf_counter() - self._begun

    def _check_time(self, budget: Budget) -> None:
        self._clock()
        if budget.seconds is not None and self.seconds >= budget.seconds:
            raise BudgetSpent("seconds")
