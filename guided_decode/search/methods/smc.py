"""Sequential Monte Carlo with the critic as twist: weighted samples of the tilted policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.pieces import grow, require_counts
from guided_decode.search.requests import Sampling
from guided_decode.search.result import Candidate, Search, SearchResult, highest
from guided_decode.search.seeds import derive, uniform

Choice = Literal["sample", "best"]


def sequential_monte_carlo(
    prompt: Sequence[int],
    *,
    particles: int = 16,
    block: int = 32,
    beta: float = 1.0,
    threshold: float = 0.5,
    choice: Choice = "sample",
    max_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    stop_ends: bool = False,
) -> Search:
    """Particles that approximate π(x)·exp(beta·V(x))/Z over whole responses x.

    Twisted sequential Monte Carlo (Zhao et al., arXiv 2404.17546) with the twist exp(beta·V): after
    each block a particle's weight grows by the factor exp(beta·(V(new) − V(old))), the first time
    by exp(beta·V(new)); where the effective sample size falls to `threshold` times the particles,
    they are drawn anew in proportion to their weights (systematic resampling, which keeps the
    estimate of Z unbiased) and weigh alike. At a response's end V is the judge's value of the whole
    response: the target does not depend on what a critic says on the way, but the closer that is to
    the truth, the fewer particles are needed.

    `details`: "weights", normalised, one a candidate; "log_normaliser", the logarithm of the
    estimate of Z = E_π[exp(beta·V(x))]; "ess", the effective sample size after each block;
    "resampled", after which blocks particles were drawn anew.

    Args:
        prompt: token ids.
        particles: how many.
        block: tokens between two weightings.
        beta: weight of a value, in nats a unit.
        threshold: of the effective sample size, as a share of the particles; 1 resamples always.
        choice: the response is drawn by weight ("sample"), or has the highest value ("best").
        max_tokens, sampling, seed: as of `best_of_n`; π is the policy as it is sampled.
        stop_ends: a stop string ends the response, and not the block alone.
    """
    require_counts(particles=particles, block=block, max_tokens=max_tokens)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected a number between 0 and 1")
    if not math.isfinite(beta):
        raise ValueError(f"beta={beta}: expected a finite number")
    if choice not in ("sample", "best"):
        raise ValueError(f"choice={choice!r}: expected 'sample' or 'best'")
    prompt = tuple(prompt)
    beams = [Candidate(score=0.0)] * particles
    log_weights, log_normaliser = [0.0] * particles, 0.0
    ess: list[float] = []
    resampled: list[int] = []
    stopped = None
    try:
        while any(not beam.finished for beam in beams):
            grown = yield from grow(
                prompt, beams, block=block, max_tokens=max_tokens, sampling=sampling,
                seeds=[derive(seed, len(ess), i) for i in range(particles)], stop_ends=stop_ends,
            )  # fmt: skip
            for i, (new, old) in enumerate(zip(grown, beams, strict=True)):
                log_weights[i] += beta * ((new.score or 0.0) - (old.score or 0.0))
            beams = grown
            ess.append(effective_sample_size(log_weights))
            unfinished = any(not beam.finished for beam in beams)
            if unfinished and ess[-1] <= threshold * particles:
                log_normaliser += log_mean_exp(log_weights)
                drawn = systematic(normalised(log_weights), uniform(seed, len(ess), -1))
                beams, log_weights = [beams[i] for i in drawn], [0.0] * particles
                resampled.append(len(ess))
    except BudgetSpent as limit:
        stopped = str(limit)
    log_normaliser += log_mean_exp(log_weights)
    weights = normalised(log_weights)
    kept = [i for i, beam in enumerate(beams) if beam.tokens]
    candidates = tuple(beams[i] for i in kept)
    chosen = highest(candidates)
    if candidates and choice == "sample":
        chosen = kept.index(systematic(weights, uniform(seed, -1), 1)[0])
    details = {"weights": [weights[i] for i in kept], "log_normaliser": log_normaliser,
               "ess": ess, "resampled": resampled}  # fmt: skip
    return SearchResult(candidates, chosen, stopped, details)


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1."""
    most = max(log_weights)
    weights = [math.exp(each - most) for each in log_weights]
    total = math.fsum(weights)
    return [each / total for each in weights]


def log_mean_exp(log_weights: Sequence[float]) -> float:
    """The logarithm of the mean weight."""
    most = max(log_weights)
    return most + math.log(math.fsum(math.exp(w - most) for w in log_weights) / len(log_weights))


def effective_sample_size(log_weights: Sequence[float]) -> float:
    """(Σw)² / Σw² (Kong, Liu and Wong, 1994)."""
    return 1.0 / math.fsum(each**2 for each in normalised(log_weights))


def systematic(weights: Sequence[float], offset: float, n: int | None = None) -> list[int]:
    """Indices drawn in proportion to weights with one offset in [0, 1) for all (Carpenter, 1999).

    n: how many; None, as many as there are weights.
    """
    n = len(weights) if n is None else n
    drawn, below, i = [], weights[0], 0
    for place in range(n):
        point = (place + offset) / n
        while point >= below and i < len(weights) - 1:
            i += 1
            below += weights[i]
        drawn.append(i)
    return drawn
