"""The likeliest next tokens, read from logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from guided_decode.kernels import top_candidates
from guided_decode.search.requests import NextTokens


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


def _tempered(logits: Tensor, log_probs: Tensor, heat: Tensor) -> Tensor:
    return log_probs if bool((heat == 1).all()) else (logits / heat).log_softmax(-1)


def _at(log_probs: Tensor, tokens: Tensor) -> list[list[float]]:
    values: list[list[float]] = log_probs.gather(-1, tokens.clamp(min=0)).tolist()
    return values
