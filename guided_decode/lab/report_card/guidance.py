"""What guidance by a critic would do at positions of responses: advantages, KL, a beta for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from guided_decode.critics.rollout import Rollout
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.rule import guide, select_candidates
from guided_decode.guidance.terminal import score_candidates
from guided_decode.lab.demo.divergences import sampled_kl
from guided_decode.scorer import Scorer, Scores

_ROWS = 16
_MOST_BETA = 1e6
# Halvings of the interval of beta; KL is told to fewer digits.
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Positions:
    """Candidates at positions of responses, with all that the rule reads.

    logits: float32 [positions, k + 1], those of the candidates and, last, the log of what all
    other tokens have. candidates: int64 [positions, k], the columns of logits, -1 where padded.
    scores: of the candidates. exempt: bool [positions, k], terminals with A = 0; or None.
    """

    logits: Tensor
    candidates: Tensor
    scores: Scores
    exempt: Tensor | None

    @property
    def advantages(self) -> Tensor:
        """A(s,a), float32 [positions, k]; NaN where padded."""
        advantages = self.scores.values - self.scores.baseline[:, None]
        if self.exempt is not None:
            advantages = advantages.masked_fill(self.exempt, 0.0)
        return advantages.masked_fill(self.candidates < 0, math.nan)

    def kl(self, config: GuidanceConfig) -> float:
        """Mean KL(guided ‖ policy) of a step, nats; exact."""
        guided = guide(self.logits, self.candidates, self.scores, config, exempt=self.exempt)
        return float(sampled_kl(guided, self.logits).mean())


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The beta whose mean KL is `budget` nats a token; None where none has it, and why."""

    budget: float
    beta: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the candidates' advantages lie apart, in the critic's units.

    mean, median, p90: over positions, of the standard deviation under the policy. range: the mean
    difference of the best and the worst candidate.
    """

    mean: float
    median: float
    p90: float
    range: float


@torch.no_grad()
def read_positions(
    policy: Any,
    scorer: Scorer,
    rollouts: Sequence[Rollout],
    config: GuidanceConfig,
    *,
    terminals: Collection[int],
    count: int,
    seed: int,
) -> Positions:
    """Positions of responses, drawn evenly, with their candidates scored.

    Args:
        policy: a causal LM.
        config: which candidates there are.
        terminals: ids that end a response.
        count: the most positions.
    """
    every = [(i, t) for i, row in enumerate(rollouts) for t in range(len(row.response))]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(every), generator=generator)[:count].tolist()
    chosen = sorted(every[i] for i in drawn)
    logits = logits_at(policy, rollouts, chosen)
    candidates = select_candidates(logits, config.top_k, config.top_p).cpu()
    prefixes = [rollouts[i].ids[: len(rollouts[i].prompt) + t] for i, t in chosen]
    values, baselines, exempt = [], [], []
    for start in range(0, len(prefixes), _ROWS):
        rows = slice(start, start + _ROWS)
        own = candidates[rows]
        scores, ends = score_candidates(scorer, prefixes[rows], own, [terminals] * len(own))
        values.append(scores.values.float().cpu())
        baselines.append(scores.baseline.float().cpu())
        exempt.append(torch.zeros_like(own, dtype=torch.bool) if ends is None else ends.cpu())
    columns = torch.arange(candidates.shape[1]).expand_as(candidates)
    return Positions(
        _with_rest(logits.cpu(), candidates),
        columns.masked_fill(candidates < 0, -1),
        Scores(torch.cat(values), torch.cat(baselines)),
        torch.cat(exempt),
    )


def spread(positions: Positions) -> Spread:
    """The spread of advantages at positions."""
    advantages, there = positions.advantages, positions.candidates >= 0
    plain = advantages.masked_fill(~there, 0.0)
    weights = positions.logits[:, :-1].masked_fill(~there, -math.inf).softmax(-1)
    mean = (weights * plain).sum(-1, keepdim=True)
    deviation = (weights * (plain - mean).square()).sum(-1).sqrt()
    best = advantages.masked_fill(~there, -math.inf).amax(-1)
    worst = advantages.masked_fill(~there, math.inf).amin(-1)
    return Spread(
        float(deviation.mean()),
        float(deviation.median()),
        float(deviation.quantile(0.9)),
        float((best - worst).mean()),
    )


def suggest(positions: Positions, config: GuidanceConfig, budget: float) -> Suggestion:
    """The beta above 0 whose mean KL is the budget, by bisection: KL grows with beta."""

    def kl(beta: float) -> float:
        return positions.kl(config.changed(beta=beta))

    if (least := kl(0.0)) >= budget:
        return Suggestion(budget, None, f"top_k={config.top_k} alone costs {least:.3g} nats")
    high = 1.0
    while kl(high) < budget:
        high *= 4.0
        if high > _MOST_BETA:
            most = kl(_MOST_BETA)
            return Suggestion(budget, None, f"no beta costs more than {most:.3g} nats")
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < budget else (low, middle)
    return Suggestion(budget, high)


def logits_at(
    policy: Any, rollouts: Sequence[Rollout], chosen: Sequence[tuple[int, int]]
) -> Tensor:
    """The policy's logits at (rollout, tokens of the response), float32 [positions, vocab]."""
    found = []
    for i, own in groupby(chosen, key=lambda each: each[0]):
        row = rollouts[i]
        places = torch.tensor([len(row.prompt) + t - 1 for _, t in own], device=policy.device)
        ids = torch.tensor([row.ids], device=policy.device)
        # The stock forward: what comes after the head is the model's own.
        output = policy(input_ids=ids, logits_to_keep=places, use_cache=False)
        found.append(output.logits[0].float())
    return torch.cat(found)


def _with_rest(logits: Tensor, candidates: Tensor) -> Tensor:
    """Logits of the candidates, −inf where padded, and of all others together."""
    there = candidates >= 0
    own = logits.gather(-1, candidates.clamp(min=0)).masked_fill(~there, -math.inf)
    index = torch.where(there, candidates, candidates[:, :1])
    rest = logits.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([own, rest], -1)
