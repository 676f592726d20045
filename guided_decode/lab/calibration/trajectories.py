"""What abstention and pruning would have done along responses that were written without them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guided_decode.critics.rollout import Rollout
from guided_decode.guidance.candidates import gated_rows
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.rule import scored_candidates, select_candidates
from guided_decode.guidance.terminal import score_candidates
from guided_decode.lab.intervals import wilson
from guided_decode.lab.report_card.guidance import logits_at
from guided_decode.scorer import Scorer

_ROWS = 16


@dataclass(frozen=True, slots=True)
class Share:
    """How many of some responses were interrupted; tokens: that they have, saved: behind where they
    were ended."""

    interrupted: int
    of: int
    tokens: int
    saved: int

    @property
    def share(self) -> float:
        return self.interrupted / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%; None of nothing."""
        return wilson(self.interrupted, self.of) if self.of else None

    @property
    def saved_share(self) -> float:
        return self.saved / self.tokens if self.tokens else math.nan


def lowest(values: Tensor, after: int) -> float:
    """The least V that abstention reads along a response; infinite where it reads none.

    values: float32 [tokens], V before each token, the prompt's first. after: tokens that there are
    before any is read.
    """
    read = values[after:]
    return float(read.min()) if len(read) else math.inf


def ended_at(values: Tensor, threshold: float, after: int) -> int | None:
    """Tokens of a response at which its value ends it; None where it does not."""
    below = (values[after:] < threshold).nonzero()
    return int(below[0]) + after if len(below) else None


def ended(values: Sequence[Tensor], threshold: float, after: int) -> Share:
    """What abstention would have done to responses, by V before each of their tokens."""
    stops = [ended_at(each, threshold, after) for each in values]
    return Share(
        sum(stop is not None for stop in stops),
        len(values),
        sum(map(len, values)),
        sum(len(v) - stop for v, stop in zip(values, stops, strict=True) if stop is not None),
    )


def pruned(gaps: Sequence[Tensor], margin: float) -> Share:
    """Of how many responses a token would have been pruned; gaps: as of `prune_gaps`."""
    hit = sum(bool((each > margin).any()) for each in gaps)
    return Share(hit, len(gaps), sum(map(len, gaps)), 0)


@torch.no_grad()
def prune_gaps(
    policy: Any,
    scorer: Scorer,
    rollouts: Sequence[Rollout],
    config: GuidanceConfig,
    terminals: Collection[int],
) -> list[Tensor]:
    """How far each token lies below its step's best candidate, max A − A(s,a): float32 [tokens].

    A token is pruned where that is more than the margin. 0 for tokens that pruning leaves alone: a
    terminal that is exempt, a step that a gate lets pass, and with tail="keep" what is no
    candidate; with tail="mask" that is infinite, as no margin lets it be.

    Args:
        policy: a causal LM, whose candidates these are.
        config: of pruning; its margin is not looked at.
        terminals: ids that end a response.
    """
    return [_gaps(policy, scorer, each, config, terminals) for each in rollouts]


def _gaps(
    policy: Any,
    scorer: Scorer,
    rollout: Rollout,
    config: GuidanceConfig,
    terminals: Collection[int],
) -> Tensor:
    places = [(0, t) for t in range(len(rollout.response))]
    logits = logits_at(policy, [rollout], places).cpu()[:, : scorer.vocab_size]
    candidates = select_candidates(logits, config.top_k, config.top_p)
    prefixes = [rollout.ids[: len(rollout.prompt) + t] for _, t in places]
    values, baselines, scored = [], [], []
    for start in range(0, len(prefixes), _ROWS):
        rows = slice(start, start + _ROWS)
        own = candidates[rows]
        scores, exempt = score_candidates(scorer, prefixes[rows], own, [terminals] * len(own))
        values.append(scores.values.float().cpu())
        baselines.append(scores.baseline.float().cpu())
        scored.append(scored_candidates(own, None if exempt is None else exempt.cpu()))
    found, there = torch.cat(values), torch.cat(scored)
    if not bool(found[there].isfinite().all()):
        raise ValueError("the scorer says NaN or infinity of a candidate: expected numbers")
    advantage = found.masked_fill(~there, -torch.inf)
    chosen = candidates == torch.tensor(rollout.response)[:, None]
    # V(prefix) is the same for all candidates of a step.
    best, taken = advantage.amax(-1), advantage.masked_fill(~chosen, -torch.inf).amax(-1)
    gaps = torch.where(taken > -torch.inf, best - taken, 0.0)
    gaps[_let_pass(logits, torch.cat(baselines), config)] = 0.0
    if config.tail == "mask":
        gaps[~chosen.any(-1)] = torch.inf
    return gaps


def _let_pass(logits: Tensor, baseline: Tensor, config: GuidanceConfig) -> Tensor:
    """Steps in which a gate keeps guidance out, bool [tokens]; baseline: V before each token."""
    passes = torch.zeros(len(logits), dtype=torch.bool)
    if config.gate is not None:
        passes |= gated_rows(logits, [config.gate] * len(logits)).cpu()
    if config.has_value_gate:
        values = baseline.tolist()
        before = [math.nan, *values[:-1]]
        opened = [config.is_open(v, b) for v, b in zip(values, before, strict=True)]
        passes |= ~torch.tensor(opened)
    return passes
