"""Majority vote over the answers of samples, plain or weighted by their values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.best_of_n import responses
from guided_decode.search.methods.pieces import require_counts
from guided_decode.search.requests import Extend, Judge, Sampling, Tokens
from guided_decode.search.result import Candidate, Search, SearchResult, highest
from guided_decode.search.seeds import derive

# The answer in a response; None: it has none.
Answer = Callable[[Tokens], Hashable | None]


def vote(
    prompt: Sequence[int],
    *,
    answer: Answer,
    n: int = 16,
    weighted: bool = False,
    max_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
) -> Search:
    """Draws n responses and chooses one whose answer most of them have.

    Wang et al., "Self-consistency improves chain of thought reasoning" (ICLR 2023); weighted by
    value: the sum of the values of the responses with an answer (Li et al., arXiv 2206.02336).

    Args:
        prompt: token ids.
        answer: the answer in a response's token ids; responses without one have no vote.
        n: responses.
        weighted: a vote counts the judge's value, and not 1; values should not be negative.
        max_tokens, sampling, seed: as of `best_of_n`.
    """
    require_counts(n=n, max_tokens=max_tokens)
    prompt = tuple(prompt)
    candidates: list[Candidate] = []
    stopped = None
    try:
        answers = yield Extend([prompt], n, [max_tokens], sampling, [derive(seed, 0)])
        candidates = responses(answers)
        if weighted:
            scores = yield Judge([each.judged(prompt) for each in candidates])
            candidates = [each.scored(v) for each, v in zip(candidates, scores, strict=True)]
    except BudgetSpent as limit:
        stopped = str(limit)
    chosen, votes = elect(candidates, answer, weighted=weighted and stopped is None)
    return SearchResult(tuple(candidates), chosen, stopped, {"votes": votes})


def elect(
    candidates: Sequence[Candidate], answer: Answer, *, weighted: bool
) -> tuple[int | None, dict[Hashable, float]]:
    """The first of the best candidates that have the answer with most votes, and all votes.

    Of answers with equally many votes, the one that came first. Where nobody has an answer, the
    best candidate of all.
    """
    votes: dict[Hashable, float] = defaultdict(float)
    voters: dict[Hashable, list[int]] = defaultdict(list)
    for i, each in enumerate(candidates):
        if (given := answer(each.tokens)) is not None:
            votes[given] += (each.score or 0.0) if weighted else 1.0
            voters[given].append(i)
    if not votes:
        return highest(list(candidates)), {}
    own = voters[max(votes, key=lambda given: votes[given])]
    best = highest([candidates[i] for i in own])
    assert best is not None
    return own[best], dict(votes)
