"""Segment rejection: segments are drawn again until their value passes a rising threshold."""

from __future__ import annotations

import math
from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.pieces import require_counts
from guided_decode.search.requests import Judge, Judged, Next, NextTokens, Request, Tokens
from guided_decode.search.result import Candidate, Search, SearchResult
from guided_decode.search.seeds import uniform


@dataclass(frozen=True, slots=True)
class Segments:
    """The settings of segment rejection; the defaults are CARDS's (arXiv 2406.16306 and its code).

    target: r*, the value that a whole response should have, in the judge's units. entropy: a
    segment ends before a token whose distribution has at least this entropy, in nats, but not
    before it has `shortest` tokens; at `longest` it ends in any case. alpha: where the threshold
    begins, between the prompt's value (0) and r* (1). beta: how far below the threshold a value may
    be, in units of value. accept: "soft", with probability min(1, exp((r − τ)/beta)); "hard", where
    r ≥ τ. temperature, top_k: of the draws. retries: after so many rejections one segment more is
    drawn, and the best of them all is taken.
    """

    target: float
    entropy: float = 3.0
    shortest: int = 4
    longest: int = 64
    alpha: float = 0.5
    beta: float = 0.7
    accept: Literal["soft", "hard"] = "soft"
    temperature: float = 0.7
    top_k: int = 40
    retries: int = 20

    def __post_init__(self) -> None:
        for name, least in (("shortest", 1), ("longest", 1), ("top_k", 1), ("retries", 0)):
            if (given := getattr(self, name)) < least:
                raise ValueError(f"{name}={given}: expected an integer of at least {least}")
        for name in ("beta", "temperature"):
            if not (given := getattr(self, name)) > 0:
                raise ValueError(f"{name}={given}: expected a number above 0")
        if not math.isfinite(self.target):
            raise ValueError(f"target={self.target}: expected a finite number, in the judge's "
                             "units")  # fmt: skip
        if not self.entropy >= 0:
            raise ValueError(f"entropy={self.entropy}: expected a number of at least 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected a number between 0 and 1")
        if self.accept not in ("soft", "hard"):
            raise ValueError(f"accept={self.accept!r}: expected 'soft' or 'hard'")


def segment_rejection(
    prompt: Sequence[int],
    segments: Segments,
    *,
    max_tokens: int = 128,
    seed: int = 0,
) -> Search:
    """Cascade reward sampling (CARDS; Li et al., arXiv 2406.16306): rejection by segments.

    A segment ends where the policy is unsure what follows, since a reward model judges whole pieces
    of meaning better than cut ones. With r of the response so far and t its tokens, a segment is
    accepted with probability min(1, exp((r − τ(t))/beta)), where τ rises with t from r0 = (1 −
    alpha)·r(prompt) + alpha·r* to r* at max_tokens; r* where r0 is above it.

    The defaults: entropy 3.0, segments of 4 to 64 tokens, alpha 0.5, beta 0.7, temperature 0.7,
    top-k 40, 20 retries, 128 tokens. r* has none: it is 8.5 for the paper's reward model. Unlike
    the paper's code, a response ends at an end-of-sequence token, and at max_tokens exactly.

    `details`: "lengths", of the segments; "attempts", how many were drawn for each; "forced", how
    many were taken after the last retry.

    Args:
        prompt: token ids.
        segments: see `Segments`.
        max_tokens: of the response.
        seed: of all draws.
    """
    require_counts(max_tokens=max_tokens)
    drawing = _Drawing(tuple(prompt), segments, max_tokens, seed)
    response = Candidate()
    lengths: list[int] = []
    attempts: list[int] = []
    forced, stopped = 0, None
    try:
        (value,) = yield Judge([Judged(drawing.prompt, (), False)])
        first = (1 - segments.alpha) * value + segments.alpha * segments.target
        while not response.finished:
            longer, drawn, accepted = yield from drawing.settle(response, first)
            lengths.append(len(longer.tokens) - len(response.tokens))
            attempts.append(drawn)
            forced += not accepted
            response = longer
    except BudgetSpent as limit:
        stopped = str(limit)
    candidates = (response,) if response.tokens else ()
    details = {"lengths": lengths, "attempts": attempts, "forced": forced}
    return SearchResult(candidates, 0 if candidates else None, stopped, details)


def rising(first: float, last: float, share: float) -> float:
    """The threshold where this share of the most tokens is written."""
    return min(last, first + share * (last - first))


def acceptable(value: float, threshold: float, point: float, segments: Segments) -> bool:
    """Whether a segment is accepted; point: uniform in [0, 1)."""
    if segments.accept == "hard":
        return value >= threshold
    return point < math.exp(min(0.0, (value - threshold) / segments.beta))


class _Drawing:
    """Draws segments, and asks for a prefix's distribution once, however often it is drawn from."""

    def __init__(self, prompt: Tokens, segments: Segments, max_tokens: int, seed: int) -> None:
        self.prompt = prompt
        self.segments = segments
        self.max_tokens = max_tokens
        self.seed = seed
        self._known: dict[Tokens, NextTokens] = {}

    def settle(
        self, response: Candidate, first: float
    ) -> Coroutine[Request, Any, tuple[Candidate, int, bool]]:
        """The response with the segment that is taken; how many were drawn; whether it passed.

        first: where the threshold begins.
        """
        start, best, most = len(response.tokens), response, -math.inf
        for attempt in range(self.segments.retries + 1):
            candidate = yield from self._segment(response, attempt)
            (value,) = yield Judge([candidate.judged(self.prompt)])
            candidate = candidate.scored(value)
            if value > most:
                best, most = candidate, value
            share = len(candidate.tokens) / self.max_tokens
            threshold = rising(first, self.segments.target, share)
            point = uniform(self.seed, start, attempt, -1)
            # What is drawn after the last retry is not asked whether it passes.
            if attempt < self.segments.retries and acceptable(
                value, threshold, point, self.segments
            ):
                self._keep(candidate.tokens)
                return candidate, attempt + 1, True
        self._keep(best.tokens)
        return best, self.segments.retries + 1, False

    def _segment(self, response: Candidate, attempt: int) -> Coroutine[Request, Any, Candidate]:
        """The response with one segment more, not judged yet."""
        start, longer = len(response.tokens), replace(response, score=None)
        while not longer.finished and len(longer.tokens) - start < self.segments.longest:
            after = yield from self._next(longer.tokens)
            long_enough = len(longer.tokens) - start >= self.segments.shortest
            assert after.entropy is not None
            if long_enough and after.entropy >= self.segments.entropy:
                break
            i = _drawn(after.tempered, uniform(self.seed, start, attempt, len(longer.tokens)))
            tokens = (*longer.tokens, after.tokens[i])
            longer = Candidate(
                tokens,
                longer.log_prob + after.log_probs[i],
                after.ends[i] or len(tokens) >= self.max_tokens,
            )
        return longer

    def _keep(self, tokens: Tokens) -> None:
        """Forgets what only rejected segments had: the response goes on from these tokens."""
        known = self._known.get(tokens)
        self._known = {} if known is None else {tokens: known}

    def _next(self, tokens: Tokens) -> Coroutine[Request, Any, NextTokens]:
        if tokens not in self._known:
            (answer,) = yield Next(
                [self.prompt + tokens], self.segments.top_k, self.segments.temperature,
                entropy=True,
            )  # fmt: skip
            self._known[tokens] = answer
        return self._known[tokens]


def _drawn(log_probs: Sequence[float], point: float) -> int:
    """An index in proportion to these probabilities, by one uniform number in [0, 1)."""
    weights = [math.exp(each) for each in log_probs]
    point *= math.fsum(weights)
    for i, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return i
    return len(weights) - 1
