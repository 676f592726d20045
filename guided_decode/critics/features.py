"""Hidden states of a trunk at the prefixes of rollouts, read anew or kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from guided_decode.critics.rollout import Rollout

# Bytes of hidden states that are kept, of a trunk that does not change.
KEPT = 2 << 30
_ROWS = 64


def last_hidden_states(trunk: Any, rows: Sequence[Rollout], *, at_end: bool) -> Tensor:
    """Hidden states after the final norm at each prefix, [rows, width, hidden].

    Rows are padded on the right, where no token looks.
    """
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row.ids), dtype=torch.int64) for row in rows], True)
    hidden: Tensor = trunk(
        input_ids=ids.to(trunk.device), attention_mask=mask.to(trunk.device), use_cache=False
    ).last_hidden_state
    width = max(row.prefixes(at_end=at_end) for row in rows)
    first = torch.tensor([len(row.prompt) - 1 for row in rows])
    places = (first[:, None] + torch.arange(width)).clamp(max=ids.shape[1] - 1)
    index = places.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


class Features:
    """The hidden states of all rollouts by a frozen trunk, on the CPU."""

    def __init__(self, trunk: Any, rollouts: Sequence[Rollout], *, at_end: bool) -> None:
        self._rows: list[Tensor] = []
        # Always in the same batches: rounding depends on them, and a run that goes on shall not.
        for start in range(0, len(rollouts), _ROWS):
            rows = rollouts[start : start + _ROWS]
            with torch.no_grad():
                hidden = last_hidden_states(trunk, rows, at_end=at_end).float().cpu()
            self._rows += [
                states[: row.prefixes(at_end=at_end)].clone()
                for row, states in zip(rows, hidden, strict=True)
            ]

    def rows(self, indices: Sequence[int]) -> Tensor:
        """float32 [rows, width, hidden], 0 behind a row's last prefix."""
        return pad_sequence([self._rows[i] for i in indices], batch_first=True)


def fits(trunk: Any, rollouts: Sequence[Rollout], *, at_end: bool) -> bool:
    """Whether the hidden states of all rollouts are few enough to be kept."""
    size = int(trunk.config.get_text_config().hidden_size)
    return 4 * size * sum(row.prefixes(at_end=at_end) for row in rollouts) <= KEPT
