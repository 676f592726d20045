"""From a target divergence to beta: solved on the states that this beta's own decoding visits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from guided_decode.guidance.config import Tail
from guided_decode.lab.calibration.states import Measured, States, joined, measured

# Rounds whose beta is within this factor share their states: what they visit hardly differs.
_NEAR = 1.25
# A round that moves beta by less, and an error of the divergence below this, end the search.
_SETTLED, _CERTAIN = 0.04, 0.04
_MOST_DOUBLINGS = 400


@dataclass(frozen=True, slots=True)
class Calibrated:
    """beta: yields the target. measured: the divergence on the states of the last rounds at it.

    rounds: of decoding. tokens: that they decoded. settled: whether another round would not have
    moved it.
    """

    target: float
    beta: float
    measured: Measured
    rounds: int
    tokens: int
    settled: bool


def calibrate(
    sample: Callable[[float, int], States], pilot: States, target: float, tail: Tail, rounds: int
) -> Calibrated:
    """The beta at which guided sampling diverges from the policy by `target` nats a token.

    A divergence belongs to the states that its decoder visits, and guidance changes these. So each
    round decodes anew with the last beta, and solves for the target on what it met there; beta
    is right where it is the solution on its own states.

    Args:
        sample: decodes with a beta, in the round of that number, and says what it met.
        pilot: what plain decoding meets.
        target: nats a token, above 0.
        tail: of the guidance.
        rounds: at most.

    Raises:
        ValueError: no beta of these candidates yields the target.
    """
    beta = solve(pilot, target, tail)
    met: list[tuple[float, States]] = []
    tokens = 0
    for number in range(1, rounds + 1):
        states = sample(beta, number)
        tokens += len(states)
        met.append((beta, states))
        near = joined([each for own, each in met if 1 / _NEAR < own / beta < _NEAR])
        solved = solve(near, target, tail)
        there = measured(near, solved, tail)
        moved = abs(math.log(solved / beta))
        if moved < _SETTLED and there.error < _CERTAIN * target:
            return Calibrated(target, solved, there, number, tokens, settled=True)
        beta = solved
    return Calibrated(target, beta, there, rounds, tokens, settled=False)


def solve(states: States, target: float, tail: Tail) -> float:
    """The beta above 0 whose divergence on these states is the target, to 1e-6 of itself.

    The divergence grows with beta: its derivative is beta times a variance.

    Raises ValueError: the target is out of reach.
    """

    def kl(beta: float) -> float:
        return measured(states, beta, tail).kl

    least = kl(0.0)
    if least >= target:
        raise ValueError(
            f"target_kl={target:g}: the candidates alone, at beta 0, lie {least:.4g} nats a token "
            'from the policy, as tail="mask" drops the other tokens: expected a larger target, '
            'or more candidates (top_k, top_p), or tail="keep"'
        )
    low, high = 0.0, _scale(states)
    reached = kl(high)
    for _ in range(_MOST_DOUBLINGS):
        if reached >= target:
            break
        low, high = high, 2 * high
        before, reached = reached, kl(high)
        if high > 1e30 or (reached - before < 1e-12 and low > 1e6 * _scale(states)):
            raise ValueError(
                f"target_kl={target:g}: these candidates reach at most {reached:.4g} nats a token, "
                "whatever beta is: expected a smaller target, more candidates (top_k, top_p), or "
                "no gate"
            )
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < target else (low, middle)
    return high


def _scale(states: States) -> float:
    """A beta at which advantages are some tenths of a nat."""
    largest = float(states.advantage.abs().max())
    if not largest > 0.0:
        raise ValueError(
            "the scorer values all candidates alike at every step, so no beta changes anything: "
            "expected a scorer of this policy's responses (is it the right checkpoint, and the "
            "right prompt format?)"
        )
    return 0.1 / largest
