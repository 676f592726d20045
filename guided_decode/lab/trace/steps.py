"""The steps of a response: what its candidates were, what they were worth, what guidance made.

Nothing is recorded while decoding: scores depend on a prefix and its candidates alone, so that the
steps of any response can be found afterwards, whoever decoded it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_decode.guidance.candidates import log_normaliser
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.rule import advantages
from guided_decode.guidance.step import ObservedStep, guide_rows
from guided_decode.scorer import Scorer

# Positions of one call: that many rows of logits are there at a time.
_ROWS = 128


@dataclass(frozen=True, slots=True)
class Step:
    """One token of a response, and what else could have been there; one entry a candidate each.

    tokens: ids, by probability; the response's own comes last where it is not among the likeliest.
    chosen: the place of the response's own; outside: it is no candidate. considered: how many
    candidates there were, of which `tokens` may have the likeliest alone. probabilities: π(a|s), of
    the full softmax at temperature 1. guided: the same after guidance. values: Q(s,a) and
    advantages: A(s,a), in the scorer's units; None where a candidate is not scored. baseline: V(s);
    None where none is.
    """

    tokens: tuple[int, ...]
    chosen: int
    outside: bool
    considered: int
    probabilities: tuple[float, ...]
    guided: tuple[float, ...]
    values: tuple[float | None, ...]
    advantages: tuple[float | None, ...]
    baseline: float | None


@torch.no_grad()
def replay(
    policy: Any,
    scorer: Scorer,
    config: GuidanceConfig,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    terminals: Collection[int] = (),
    most: int = 64,
) -> list[Step]:
    """The steps of a response as guidance by `config` met them, or would have.

    Args:
        policy: a causal LM of transformers; its logits are those that no processor has changed.
        scorer: what scores the candidates.
        config: the guidance rule.
        prompt: token ids, at least one.
        response: token ids that follow it; a terminal may be the last.
        terminals: token ids that end a response.
        most: candidates of a step that are told of; all of them are scored.

    Returns:
        One step a token of the response.

    Raises:
        ValueError: as `guide_rows`.
    """
    whole = torch.tensor([*prompt, *response])
    steps: list[Step] = []
    for start in range(len(prompt), len(whole), _ROWS):
        ends = range(start, min(start + _ROWS, len(whole)))
        places = torch.tensor(ends, device=policy.device) - 1
        # The stock forward: what comes after the head is the model's own.
        ids = whole[None, : ends.stop].to(policy.device)
        logits = policy(input_ids=ids, logits_to_keep=places, use_cache=False).logits[0].float()
        seen: list[ObservedStep] = []
        guide_rows(
            scorer, logits, [whole[:end] for end in ends], config, terminals=list(terminals),
            observe=seen.append,
        )  # fmt: skip
        (step,) = seen
        gained = advantages(step.scores, [config] * len(ends), step.scored, step.log_ratio)
        own = whole[start : ends.stop].to(logits.device)
        steps += _steps(step, logits, most, gained, own)
    return steps


def _steps(
    seen: ObservedStep, logits: Tensor, most: int, gained: Tensor, own: Tensor
) -> list[Step]:
    """The rows of one call. gained: [rows, k], A. own: int64 [rows], the response's tokens."""
    shown = seen.candidates[:, :most]
    same = seen.candidates == own[:, None]
    apart = (shown != own[:, None]).all(-1)
    # Every row has room for its own token; where that is shown already, the room stays empty.
    tokens = torch.cat([shown, own.where(apart, -1)[:, None]], -1)
    column = torch.arange(shown.shape[-1], device=own.device).expand_as(shown)
    column = torch.cat([column, same.int().argmax(-1)[:, None]], -1)
    scored = seen.scored.gather(-1, column) & (tokens >= 0)
    scored[:, -1] &= same.any(-1)
    at = tokens.clamp(min=0)
    table = _Table(
        tokens.tolist(),
        (logits.gather(-1, at) - log_normaliser(logits)).exp().tolist(),
        (seen.guided.gather(-1, at) - log_normaliser(seen.guided)).exp().tolist(),
        _where(seen.scores.values.gather(-1, column), scored),
        _where(gained.gather(-1, column), scored),
    )
    baseline = _where(seen.scores.baseline[:, None], seen.scored.any(-1, keepdim=True))
    outside = (~same.any(-1)).tolist()
    considered = (seen.candidates >= 0).sum(-1).tolist()
    rows = zip(own.tolist(), outside, considered, baseline, strict=True)
    return [
        table.step(row, token, apart_from_all, count, base)
        for row, (token, apart_from_all, count, (base,)) in enumerate(rows)
    ]


class _Table(NamedTuple):
    """Fields of `Step` for many rows, with room for what is not there (a token of -1)."""

    tokens: list[list[int]]
    probabilities: list[list[float]]
    guided: list[list[float]]
    values: list[list[float | None]]
    advantages: list[list[float | None]]

    def step(
        self, row: int, own: int, outside: bool, considered: int, baseline: float | None
    ) -> Step:
        there = [i for i, token in enumerate(self.tokens[row]) if token >= 0]
        tokens = tuple(self.tokens[row][i] for i in there)
        return Step(
            tokens,
            tokens.index(own),
            outside,
            considered,
            tuple(self.probabilities[row][i] for i in there),
            tuple(self.guided[row][i] for i in there),
            tuple(self.values[row][i] for i in there),
            tuple(self.advantages[row][i] for i in there),
            baseline,
        )


def _where(numbers: Tensor, known: Tensor) -> list[list[float | None]]:
    """[rows, n], with None where a number is not known."""
    return [
        [number if yes else None for number, yes in zip(*row, strict=True)]
        for row in zip(numbers.tolist(), known.tolist(), strict=True)
    ]
