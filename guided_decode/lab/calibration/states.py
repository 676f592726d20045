"""Next-token distributions that a decoder met, and what guidance would make of them at any beta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_decode.guidance.config import Tail


@dataclass(frozen=True, slots=True)
class States:
    """One row a token that was decoded, by the candidates of guidance there.

    probability: π(a|s) of each candidate, float64 [tokens, k]; 0 where padded.
    advantage: A(s, a), float64 [tokens, k]; 0 where a candidate is not scored.
    rest: the probability of all other tokens, float64 [tokens].
    response: which response each token belongs to, int64 [tokens].
    """

    probability: Tensor
    advantage: Tensor
    rest: Tensor
    response: Tensor

    def __len__(self) -> int:
        return len(self.rest)

    @property
    def responses(self) -> int:
        return int(self.response[-1]) + 1 if len(self) else 0


def joined(parts: Sequence[States]) -> States:
    """Several as one; responses of different parts stay different."""
    shifts = [0]
    for part in parts:
        shifts.append(shifts[-1] + part.responses)
    response = [part.response + shift for part, shift in zip(parts, shifts, strict=False)]
    width = max(part.probability.shape[1] for part in parts)

    def wide(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    return States(
        torch.cat([wide(part.probability) for part in parts]),
        torch.cat([wide(part.advantage) for part in parts]),
        torch.cat([part.rest for part in parts]),
        torch.cat(response),
    )


def divergences(states: States, beta: float, tail: Tail) -> Tensor:
    """KL(q ‖ π) of the reweighted next token, in nats, float64 [tokens].

    With q(a) ∝ π(a)·exp(beta·A(a)) over the candidates, and the other tokens as they are
    (tail="keep") or gone ("mask"): KL = Σ q·beta·A − log Σ π·exp(beta·A).
    """
    moved = beta * states.advantage
    # Weights of at most 1, whatever beta is.
    most = moved.masked_fill(states.probability == 0, 0.0).amax(-1).clamp(min=0.0)
    weight = states.probability * (moved - most[:, None]).exp()
    rest = states.rest * (-most).exp() if tail == "keep" else torch.zeros_like(states.rest)
    total = weight.sum(-1) + rest
    return (weight * moved).sum(-1) / total - (total.log() + most)


@dataclass(frozen=True, slots=True)
class Measured:
    """KL in nats a token over responses, and the standard error of that."""

    kl: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95%."""
        return self.kl - 1.96 * self.error, self.kl + 1.96 * self.error


def measured(states: States, beta: float, tail: Tail) -> Measured:
    """The divergence per token: of all tokens over all responses, a ratio of sums.

    It is the decoder's own where the states are those that this beta visits.
    """
    own = divergences(states, beta, tail)
    count = states.responses
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, states.response, own)
    tokens = torch.bincount(states.response, minlength=count).double()
    kl = float(sums.sum() / tokens.sum())
    if count < 2:
        return Measured(kl, math.inf)
    # Tokens of a response are not independent; responses are.
    residual = float((sums - kl * tokens).square().sum())
    return Measured(kl, math.sqrt(count / (count - 1) * residual) / float(tokens.sum()))


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a step's candidates lie apart in advantage, in units of the scorer's value.

    deviation: the standard deviation of A under π, its mean square over the tokens.
    median, most: of max A − min A over tokens: the 50% and the 99% quantile.
    decisive: the share of tokens whose best candidate is not π's likeliest.
    """

    deviation: float
    median: float
    most: float
    decisive: float


def spread(states: States) -> Spread:
    """The spread of advantages over states."""
    there = states.probability > 0
    mass = states.probability.sum(-1, keepdim=True).clamp(min=1e-300)
    share = states.probability / mass
    mean = (share * states.advantage).sum(-1, keepdim=True)
    variance = (share * (states.advantage - mean).square()).sum(-1)
    best = states.advantage.masked_fill(~there, -math.inf)
    worst = states.advantage.masked_fill(~there, math.inf)
    width = best.amax(-1) - worst.amin(-1)
    likeliest = states.advantage.gather(-1, states.probability.argmax(-1, keepdim=True))[:, 0]
    quantiles = width.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return Spread(
        deviation=float(variance.mean().sqrt()),
        median=quantiles[0],
        most=quantiles[1],
        decisive=float((best.amax(-1) > likeliest).double().mean()),
    )
