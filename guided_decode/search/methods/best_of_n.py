"""Best-of-n: the sample that the judge likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.pieces import require_counts
from guided_decode.search.requests import Continuation, Extend, Judge, Sampling
from guided_decode.search.result import Candidate, Search, SearchResult, highest
from guided_decode.search.seeds import derive


def best_of_n(
    prompt: Sequence[int],
    *,
    n: int = 16,
    max_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
) -> Search:
    """Draws n responses and chooses the one with the highest value (Stiennon et al., 2020).

    The baseline of every comparison: near-optimal in win rate for its divergence from the policy,
    which is at most log n − (n − 1)/n (Beirami et al., arXiv 2401.01879). A response that is cut
    off at max_tokens is chosen only where none is finished.

    Args:
        prompt: token ids.
        n: responses.
        max_tokens: of one response.
        sampling: how they are drawn; a stop string ends a response.
        seed: of all draws.
    """
    require_counts(n=n, max_tokens=max_tokens)
    prompt = tuple(prompt)
    candidates: list[Candidate] = []
    stopped = None
    try:
        answers = yield Extend([prompt], n, [max_tokens], sampling, [derive(seed, 0)])
        candidates = responses(answers)
        scores = yield Judge([each.judged(prompt) for each in candidates])
        candidates = [each.scored(v) for each, v in zip(candidates, scores, strict=True)]
    except BudgetSpent as limit:
        stopped = str(limit)
    return SearchResult(tuple(candidates), highest(candidates), stopped)


def responses(answers: Sequence[Sequence[Continuation]]) -> list[Candidate]:
    """The candidates that continuations of prompts are; a stop string ends them, too."""
    return [
        replace(Candidate().extended(each), finished=each.reason != "length")
        for own in answers
        for each in own
    ]
