"""Answers the requests of searches: of many at once, in the engine's batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guided_decode.search.budget import Budget, BudgetSpent, Spent
from guided_decode.search.requests import (
    Continuation,
    Extend,
    Generator,
    Judge,
    JudgeOfTexts,
    Next,
    NextTokens,
    Request,
    TokenGenerator,
)
from guided_decode.search.result import Search, SearchResult

_NO_LIMIT = Budget()
# Why a judge that reads text has nothing to say of single tokens.
SINGLE_TOKENS = (
    "this method values single tokens, and the judge reads responses as text: a token of the "
    "policy's may be a part of a character, or of a token of the judge's; pass a judge with the "
    "policy's tokenizer, or a method of whole responses or of blocks of several tokens"
)


def run(
    search: Search, generator: Generator, judge: JudgeOfTexts, budget: Budget = _NO_LIMIT
) -> SearchResult:
    """Runs one search to its end, or to the end of its budget."""
    return run_all([search], generator, judge, budget)[0]


def run_all(
    searches: Sequence[Search],
    generator: Generator,
    judge: JudgeOfTexts,
    budget: Budget = _NO_LIMIT,
    *,
    ended: Callable[[int, SearchResult], None] | None = None,
) -> list[SearchResult]:
    """Runs searches side by side: what they ask for at the same time is one call of the engine.

    Args:
        searches: methods that have not begun.
        generator, judge: what answers them.
        budget: of each search. It is asked before each request, so that none is exceeded but in
            seconds, by the call that is under way.
        ended: is told each search's index and result as soon as it has one, before the others end.

    Raises:
        ValueError: the judge's answer is no finite number for each text; a method asks for
            next-token distributions, and the generator gives none, or for values of single tokens,
            and the judge reads text.
    """
    running = [_Running(search) for search in searches]
    for each in running:
        each.send(None)
    told: set[int] = set()
    _tell(running, told, ended)
    while waiting := [each for each in running if each.request is not None]:
        extends = [each for each in waiting if isinstance(each.request, Extend)]
        nexts = [each for each in waiting if isinstance(each.request, Next)]
        if extends:
            _extend(extends, generator, budget)
        elif nexts:
            _next(nexts, generator, budget)
        else:
            _judge(waiting, judge, budget)
        _tell(running, told, ended)
    return [each.outcome() for each in running]


@dataclass(slots=True)
class _Running:
    """A search and what it waits for; None: it has ended.

    cut: the limit of the budget that made its continuations shorter than it asked for.
    """

    search: Search
    request: Request | None = None
    cut: str | None = None
    result: SearchResult | None = None
    spent: Spent = field(default_factory=Spent)

    def send(self, answer: Any) -> None:
        self._go(lambda: self.search.send(answer))

    def stop(self, limit: BudgetSpent) -> None:
        self._go(lambda: self.search.throw(limit))

    def _go(self, step: Any) -> None:
        self.request = None
        try:
            self.request = step()
        except StopIteration as ended:
            self.result = ended.value
            return
        self.spent.begin()

    def note_cuts(self, allowed: Extend, answer: Sequence[Sequence[Continuation]]) -> None:
        """Remembers that the budget, and not the method, ended continuations."""
        assert isinstance(self.request, Extend)
        wanted = zip(self.request.max_tokens, allowed.max_tokens, answer, strict=True)
        for own, most, continuations in wanted:
            if most < own and any(each.reason == "length" for each in continuations):
                self.cut = "policy_tokens"

    def outcome(self) -> SearchResult:
        result = self.result
        assert result is not None
        cut = None if all(each.finished for each in result.candidates) else self.cut
        return replace(result, spent=self.spent, stopped=result.stopped or cut)


def _tell(
    running: Sequence[_Running], told: set[int], ended: Callable[[int, SearchResult], None] | None
) -> None:
    if ended is None:
        return
    for i, each in enumerate(running):
        if each.result is not None and i not in told:
            told.add(i)
            ended(i, each.outcome())


def _extend(waiting: Sequence[_Running], generator: Generator, budget: Budget) -> None:
    asked: list[tuple[_Running, Extend]] = []
    for each in waiting:
        assert isinstance(each.request, Extend)
        try:
            most = each.spent.allowed(each.request, budget)
        except BudgetSpent as limit:
            each.stop(limit)
            continue
        asked.append((each, replace(each.request, max_tokens=most)))
    if not asked:
        return
    answers = generator.extend(
        [prefix for _, request in asked for prefix in request.prefixes],
        [request.n for _, request in asked for _ in request.prefixes],
        max_tokens=[most for _, request in asked for most in request.max_tokens],
        sampling=[request.sampling for _, request in asked for _ in request.prefixes],
        seeds=[seed for _, request in asked for seed in request.seeds],
    )
    done = 0
    for each, request in asked:
        own: list[list[Continuation]] = answers[done : done + len(request.prefixes)]
        done += len(request.prefixes)
        each.spent.extended(request, own)
        each.note_cuts(request, own)
        each.send(own)


def _next(waiting: Sequence[_Running], generator: Generator, budget: Budget) -> None:
    if not isinstance(generator, TokenGenerator):
        raise ValueError(
            f"{type(generator).__name__} has no next_tokens: this method needs the policy's "
            "next-token distributions, as the local generator (load_generator) gives them"
        )
    asked: list[tuple[_Running, Next]] = []
    for each in waiting:
        assert isinstance(each.request, Next)
        if _affordable(each, each.request, budget):
            asked.append((each, each.request))
    if not asked:
        return
    rows = [(prefix, request) for _, request in asked for prefix in request.prefixes]
    answers = generator.next_tokens(
        [prefix for prefix, _ in rows],
        [request.k for _, request in rows],
        temperatures=[request.temperature for _, request in rows],
        references=[request.reference for _, request in rows],
        entropies=[request.entropy for _, request in rows],
    )
    done = 0
    for each, request in asked:
        own: list[NextTokens] = answers[done : done + len(request.prefixes)]
        done += len(request.prefixes)
        each.spent.continued(request)
        each.send(own)


def _affordable(each: _Running, request: Next | Judge, budget: Budget) -> bool:
    """Whether the search has the request's cost left; it is stopped where not."""
    try:
        each.spent.check(request, budget)
    except BudgetSpent as limit:
        each.stop(limit)
        return False
    return True


def _judge(waiting: Sequence[_Running], judge: JudgeOfTexts, budget: Budget) -> None:
    asked: list[tuple[_Running, Judge]] = []
    for each in waiting:
        assert isinstance(each.request, Judge)
        if each.request.per_token and getattr(judge, "through_text", False):
            raise ValueError(SINGLE_TOKENS)
        if _affordable(each, each.request, budget):
            asked.append((each, each.request))
    if not asked:
        return
    texts = [text for _, request in asked for text in request.texts]
    values = judge.judge(texts)
    if len(values) != len(texts) or not all(map(math.isfinite, values)):
        odd = next((v for v in values if not math.isfinite(v)), f"{len(values)} values")
        raise ValueError(f"the judge answered {odd} for {len(texts)} texts: expected a finite "
                         "number for each")  # fmt: skip
    done = 0
    for each, request in asked:
        own = values[done : done + len(request.texts)]
        done += len(request.texts)
        each.spent.judged(request)
        each.send(own)
