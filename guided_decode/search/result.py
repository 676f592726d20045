"""What a search found."""

from __future__ import annotations

from collections.abc import Generator as Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from guided_decode.search.budget import Spent
from guided_decode.search.requests import Continuation, Judged, Request, Tokens

# A method under way: it yields requests, is sent their answers, and returns its candidates.
Search = Coroutine[Request, Any, "SearchResult"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response, or as much of it as there is.

    log_prob: of all its tokens under the policy. score: the judge's value; None: never judged.
    """

    tokens: Tokens = ()
    log_prob: float = 0.0
    finished: bool = False
    score: float | None = None

    def extended(self, continuation: Continuation) -> Candidate:
        """This and what follows it, not judged yet."""
        return Candidate(
            self.tokens + continuation.tokens,
            self.log_prob + sum(continuation.log_probs),
            continuation.finished,
        )

    def scored(self, score: float) -> Candidate:
        """The same with a value."""
        return replace(self, score=score)

    def judged(self, prompt: Tokens) -> Judged:
        """What a judge reads of it."""
        return Judged(prompt, self.tokens, self.finished)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All candidates of a search, and which of them it chose (None: there is none).

    stopped: the limit of the budget that ended it, or cut responses of it; None: it came to its own
    end.
    details: figures of the method, by name.
    """

    candidates: tuple[Candidate, ...]
    chosen: int | None
    stopped: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    @property
    def best(self) -> Candidate:
        """The chosen candidate. Raises ValueError: the budget ended the search before one."""
        if self.chosen is None:
            raise ValueError(f"no response was found within the budget ({self.stopped} ended it)")
        return self.candidates[self.chosen]


def highest(candidates: tuple[Candidate, ...] | list[Candidate]) -> int | None:
    """The first of those with the highest score; where none has one, the likeliest a token.

    A finished response comes before one that is not.
    """
    if not candidates:
        return None

    def rank(i: int) -> tuple[bool, bool, float, int]:
        each = candidates[i]
        mean = each.log_prob / max(1, len(each.tokens))
        return (each.finished, each.score is not None, mean if each.score is None else each.score,
                -i)  # fmt: skip

    return max(range(len(candidates)), key=rank)
