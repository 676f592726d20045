"""Reward models whose score is read where a chat format ends the turn, behind EOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode.prefix import PrefixHandle, as_ints
from guided_decode.scorer import Prefix, Scores
from guided_decode.scoring.critic import CriticScorer


class TurnEndScorer(CriticScorer):
    """Q(s·EOS) is read at the last of the tokens that its format puts after EOS.

    All else is read at its own token, as by `CriticScorer`.
    """

    def __init__(self, *args: Any, turn_end: Sequence[int], **kwargs: Any) -> None:
        """turn_end: token ids, at least one; the other arguments are `CriticScorer`'s."""
        super().__init__(*args, **kwargs)
        self.turn_end = tuple(turn_end)

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """As `CriticScorer.score`."""
        scores = super().score(prefixes, candidates)
        if self.eos_token_id is None:
            return scores
        rows, places = candidates.cpu().eq(self.eos_token_id).nonzero(as_tuple=True)
        if not len(rows):
            return scores
        end = (self.eos_token_id, *self.turn_end)
        ended = [[*_ids(prefixes[row]), *end] for row in rows.tolist()]
        nothing = torch.empty(len(ended), 0, dtype=torch.int64)
        values = scores.values.clone()
        values[rows, places] = super().score(ended, nothing).baseline
        return Scores(values, scores.baseline)

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """As `CriticScorer.refusal`."""
        return super().refusal(prefix, candidates + len(self.turn_end))


def _ids(prefix: Prefix) -> list[int]:
    ids: list[int] = (
        prefix.tokens if isinstance(prefix, PrefixHandle) else as_ints(prefix)
    ).tolist()
    return ids
