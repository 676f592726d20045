"""The likeliest next tokens, read from logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from guided_decode.kernels import top_candidates
from guided_decode.search.requests import NextTokens

# How far rounding may take a sum of probabilities above 1, and what may be missing of a whole one.
_ABOVE, _MISSING = 1e-2, 1e-4


def likeliest(
    logits: Tensor,  # [rows, vocab] float32
    reference: Tensor | None,  # [rows, vocab] float32
    k: Sequence[int],
    temperatures: Sequence[float],
    ends: Collection[int],
) -> list[NextTokens]:
    """What `NextTokens` says of each row.

    Args:
        logits: the policy's.
        reference: the reference's; a row of NaN: not wanted. None: in no row.
        k, temperatures: one a row.
        ends: token ids that end a response.
    """
    if not k:
        return []
    tokens = top_candidates(logits, min(max(k), logits.shape[-1])).candidates
    heat = torch.tensor(temperatures, dtype=torch.float32).to(logits.device)[:, None]
    log_probs = logits.log_softmax(-1)
    entropy = torch.special.entr(log_probs.exp()).sum(-1).tolist()
    read = [_at(log_probs, tokens), _at(_tempered(logits, log_probs, heat), tokens)]
    if reference is not None:
        plain = reference.log_softmax(-1)
        read += [_at(plain, tokens), _at(_tempered(reference, plain, heat), tokens)]
    found = []
    for i, ids in enumerate(tokens.tolist()):
        # Tokens of no probability are -1, at the end.
        width = min(k[i], sum(token >= 0 for token in ids))
        columns = [tuple(column[i][:width]) for column in read]
        wanted = reference is not None and not bool(reference[i, 0].isnan())
        found.append(
            NextTokens(
                tuple(ids[:width]),
                columns[0],
                columns[1],
                tuple(token in ends for token in ids[:width]),
                entropy[i],
                *(columns[2:] if wanted else ()),
            )
        )
    return found


def likeliest_of(
    log_probs: Mapping[int, float],
    k: int,
    temperature: float,
    ends: Collection[int],
    *,
    whole: bool,
) -> NextTokens:
    """What `NextTokens` says, from an engine's log-probabilities at temperature 1.

    Args:
        log_probs: by token id; at least the k largest, or all that are above no probability.
        k, temperature, ends: as of `likeliest`; the temperature is 1 where not all are there.
        whole: all are there, so that the entropy follows too.

    Raises ValueError: they are not what they are said to be.
    """
    if not log_probs:
        raise ValueError("the engine says nothing of the next token")
    mass = math.fsum(map(math.exp, log_probs.values()))
    # What is left out of fewer than k, or of all, has no probability.
    complete = whole or len(log_probs) < k
    if mass > 1 + _ABOVE or (complete and mass < 1 - _MISSING):
        raise ValueError(
            f"the probabilities of {len(log_probs)} next tokens sum to {mass:.4f}: expected "
            f"{'1' if complete else 'at most 1'}, the policy's own at temperature 1"
        )
    if whole:
        logits = torch.full((1, max(log_probs) + 1), -torch.inf, dtype=torch.float32)
        logits[0, list(log_probs)] = torch.tensor(list(log_probs.values()), dtype=torch.float32)
        return likeliest(logits, None, [k], [temperature], ends)[0]
    assert temperature == 1.0
    tokens = tuple(sorted(log_probs, key=lambda token: (-log_probs[token], token))[:k])
    plain = tuple(log_probs[token] for token in tokens)
    return NextTokens(tokens, plain, plain, tuple(token in ends for token in tokens), None)


def _tempered(logits: Tensor, log_probs: Tensor, heat: Tensor) -> Tensor:
    return log_probs if bool((heat == 1).all()) else (logits / heat).log_softmax(-1)


def _at(log_probs: Tensor, tokens: Tensor) -> list[list[float]]:
    values: list[list[float]] = log_probs.gather(-1, tokens.clamp(min=0)).tolist()
    return values
