"""Guided decoding from its definition: stock forwards of whole sequences, no cache, plain loops.

What the package makes of the embedded models is held against it; nothing of the package is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# Closer than this float32 may decide otherwise.
TIE = 1e-4


class Decision(NamedTuple):
    """A token that was taken, and by how much its guided logit was above the next one's."""

    token: int
    gap: float


def greedy(
    policy: Any,
    critic: Any,
    prompt: Sequence[int],
    *,
    beta: float,
    top_k: int,
    end: int,
    max_new_tokens: int,
) -> list[Decision]:
    """The guided answer to one prompt, its end included.

    Args:
        policy: a causal LM of transformers.
        critic: a token classifier with one label, which was never trained at an end: A = 0 there.
        prompt: token ids.
        beta, top_k: of reweighting, tail="mask".
        end: the token id that ends the answer.
        max_new_tokens: tokens of the longest answer.
    """
    ids = list(prompt)
    taken: list[Decision] = []
    while len(taken) < max_new_tokens:
        logits = _last(policy, ids)
        # The largest logits, ties to the lower id.
        chosen = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
        before = _value(critic, ids)
        guided = {
            token: logits[token]
            + (0.0 if token == end else beta * (_value(critic, [*ids, token]) - before))
            for token in chosen
        }
        best, *others = sorted(guided, key=lambda token: (-guided[token], token))
        gap = guided[best] - guided[others[0]] if others else math.inf
        taken.append(Decision(best, gap))
        ids.append(best)
        if best == end:
            break
    return taken


def difference(tokens: Sequence[int], expected: Sequence[Decision]) -> str | None:
    """Where an answer is not brute force's, in words; None where it is, up to a tie."""
    for step, (got, (token, gap)) in enumerate(zip(tokens, expected, strict=False)):
        if got != token:
            if gap < TIE:
                return None
            return f"token {step} is {got}, where brute force takes {token} (by {gap:.4g})"
    if len(tokens) != len(expected):
        return f"{len(tokens)} tokens, where brute force takes {len(expected)}"
    return None


def _value(critic: Any, ids: Sequence[int]) -> float:
    return _last(critic, ids)[0]


@torch.no_grad()
def _last(model: Any, ids: Sequence[int]) -> list[float]:
    """The model's output at the last token."""
    inputs = torch.tensor([list(ids)], device=model.device)
    output: list[float] = model(input_ids=inputs).logits[0, -1].float().tolist()
    return output
