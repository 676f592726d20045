"""What several methods do: they check their counts, and grow responses side by side."""

from __future__ import annotations

from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from guided_decode.search.requests import Continuation, Extend, Judge, Request, Sampling, Tokens
from guided_decode.search.result import Candidate


def grow(
    prompt: Tokens,
    beams: Sequence[Candidate],
    *,
    block: int,
    max_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop_ends: bool,
) -> Coroutine[Request, Any, list[Candidate]]:
    """The beams with one piece more each, and valued; those at their end as they are.

    seeds: one a beam. stop_ends: as of `longer`.
    """
    going = [i for i, beam in enumerate(beams) if not beam.finished]
    answers = yield Extend(
        [prompt + beams[i].tokens for i in going],
        1,
        [min(block, max_tokens - len(beams[i].tokens)) for i in going],
        sampling,
        [seeds[i] for i in going],
    )
    grown = list(beams)
    for i, (continuation,) in zip(going, answers, strict=True):
        grown[i] = longer(beams[i], continuation, max_tokens, stop_ends)
    scores = yield Judge([grown[i].judged(prompt) for i in going], per_token=block == 1)
    for i, score in zip(going, scores, strict=True):
        grown[i] = grown[i].scored(score)
    return grown


def longer(
    beam: Candidate, continuation: Continuation, max_tokens: int, stop_ends: bool
) -> Candidate:
    """The beam with its next piece; one that reaches max_tokens is at its end, and with stop_ends
    one that a stop string ended."""
    child = beam.extended(continuation)
    stopped = stop_ends and continuation.reason == "stop"
    ended = child.finished or stopped or len(child.tokens) >= max_tokens
    return replace(child, finished=ended)


def require_counts(**given: int) -> None:
    """Raises ValueError: one of these is below 1."""
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected an integer of at least 1")
