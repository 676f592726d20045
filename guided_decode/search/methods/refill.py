"""Prune and refill: what falls behind gives its place to a branch of what does well."""

from __future__ import annotations

from collections.abc import Sequence

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.pieces import grow, require_counts
from guided_decode.search.requests import Sampling
from guided_decode.search.result import Candidate, Search, SearchResult, highest
from guided_decode.search.seeds import derive


def prune_and_refill(
    prompt: Sequence[int],
    *,
    n: int = 16,
    block: int = 32,
    margin: float,
    max_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    stop_ends: bool = False,
) -> Search:
    """n responses grow side by side; those that fall behind begin again where a good one stands.

    After each block a response whose value is more than `margin` below the best one's is dropped,
    and its place goes to a copy of the survivors, in turn from the best down, which then go on with
    draws of their own (the idea of Gambit, arXiv 2608.08020, which prunes and branches at once).
    Finished responses keep their places, and are neither dropped nor copied.

    Args:
        prompt: token ids.
        n: responses at a time.
        block: tokens between two looks at the values.
        margin: in units of value.
        max_tokens, sampling, seed: as of `best_of_n`.
    """
    require_counts(n=n, block=block, max_tokens=max_tokens)
    if not margin >= 0:
        raise ValueError(f"margin={margin}: expected a number of at least 0")
    prompt = tuple(prompt)
    beams = [Candidate()] * n
    rounds = pruned = 0
    stopped = None
    try:
        while any(not beam.finished for beam in beams):
            grown = yield from grow(
                prompt, beams, block=block, max_tokens=max_tokens, sampling=sampling,
                seeds=[derive(seed, rounds, i) for i in range(n)], stop_ends=stop_ends,
            )  # fmt: skip
            beams, dropped = _refilled(grown, margin)
            rounds, pruned = rounds + 1, pruned + dropped
    except BudgetSpent as limit:
        stopped = str(limit)
    candidates = tuple(beam for beam in beams if beam.tokens)
    return SearchResult(candidates, highest(candidates), stopped,
                        {"rounds": rounds, "pruned": pruned})  # fmt: skip


def _refilled(beams: list[Candidate], margin: float) -> tuple[list[Candidate], int]:
    """The beams of the next round, and how many were dropped."""
    values = [beam.score for beam in beams if beam.score is not None]
    assert len(values) == len(beams)
    least = max(values) - margin
    open_ = [i for i, beam in enumerate(beams) if not beam.finished]
    behind = [i for i in open_ if values[i] < least]
    sources = sorted((i for i in open_ if values[i] >= least), key=lambda i: -values[i])
    if not sources:
        # Only finished responses do well: the rest goes on as it is.
        return beams, 0
    result = list(beams)
    for place, i in enumerate(behind):
        result[i] = beams[sources[place % len(sources)]]
    return result, len(behind)
