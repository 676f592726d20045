"""V along rollouts: what any scorer says of each prefix of a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guided_decode.critics.rollout import Rollout
from guided_decode.scorer import Scorer

_ROWS = 16


def reads_ends(scorer: Scorer) -> bool:
    """Whether a scorer's output at EOS is a value: by its terminal rule."""
    return scorer.terminal == "critic"


def values_along(
    scorer: Scorer,
    rollouts: Sequence[Rollout],
    *,
    at_end: bool | None = None,
    done: Callable[[int], None] = lambda rollouts: None,
) -> list[Tensor]:
    """V of each rollout's prefixes, the prompt first: float32 [prefixes] each.

    Args:
        scorer: a critic or reward model.
        at_end: whether the whole response is a prefix, too; None: where the scorer is read at EOS,
            or the response has no end.
        done: told how many rollouts are read.

    Raises ValueError: an implicit reward or a process reward model, which value tokens or steps and
        no prefixes; a value that is no number.
    """
    if scorer.terminal == "included":
        raise ValueError(
            "an implicit reward has no value of a prefix: expected a critic or a reward model"
        )
    ends = reads_ends(scorer) if at_end is None else at_end
    none = torch.empty(0, 0, dtype=torch.int64)
    found: list[Tensor] = []
    for start in range(0, len(rollouts), _ROWS):
        rows = rollouts[start : start + _ROWS]
        lengths = [
            row.prefixes(at_end=ends or (at_end is None and not row.finished)) for row in rows
        ]
        # One forward for all: the prefixes below are in the cache by then.
        whole = [row.ids[: len(row.prompt) + n - 1] for row, n in zip(rows, lengths, strict=True)]
        scorer.score(whole, none.new_empty(len(whole), 0))
        prefixes = [
            ids[: len(row.prompt) + i]
            for row, ids, n in zip(rows, whole, lengths, strict=True)
            for i in range(n)
        ]
        values = scorer.score(prefixes, none.new_empty(len(prefixes), 0)).baseline.float().cpu()
        if not bool(values.isfinite().all()):
            raise ValueError("the scorer says NaN or infinity of a prefix: expected numbers")
        found += values.split(lengths)
        done(len(found))
    return found
