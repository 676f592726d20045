"""What Model Runner V2 has on its device of a step's rows, read in one blocking copy."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_decode.growable import Ints

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

# Tokens that a history is compared by with what is known of it, besides those that are new.
_COMPARED = 8
# The rank of a draft that is forbidden.
NEVER = 1 << 40
# Rows of logits that are looked at together: what is made of them is as large as they are.
_ROWS = 64


class RowTokens(NamedTuple):
    """A row of the logits.

    slot: of its request. offset: how many drafted tokens there are before it. position: of its last
    token. draft: that token, if it is a draft; -1 is a placeholder. rank: how many tokens have a
    larger logit than the draft has; `NEVER` where it is forbidden. tail: the last tokens of the
    request's history, drafts left out.
    """

    slot: int
    offset: int
    position: int
    draft: int
    rank: int
    tail: Ints


class SlotTokens:
    """Reads the runner's buffers."""

    def __init__(self, states: "LogitsProcRequestState", drafts: int) -> None:
        """drafts: the most drafted tokens of a request and step."""
        self._states = states
        self._width = _COMPARED + drafts + 1

    def read(
        self, context: "LogitsContext", logits: Tensor, whole: Mapping[int, int]
    ) -> tuple[list[RowTokens], dict[int, Ints]]:
        """The rows of a step, and whole histories.

        Args:
            context: of the step.
            logits: [rows, vocab].
            whole: slots whose histories are wanted, and so many tokens of each or more.
        """
        ids: Any = self._states.all_token_ids.gpu
        slots, offsets, positions, tokens = (
            each.long()
            for each in (
                context.expanded_idx_mapping,
                context.expanded_local_pos,
                context.pos,
                context.input_ids,
            )
        )
        back = torch.arange(1 - self._width, 1, device=slots.device)
        places = (positions - offsets)[:, None] + back
        tails = ids[slots[:, None], places.clamp(min=0)].long()
        has_drafts = len(slots) > len(context.idx_mapping_np)
        ranks = _ranks(logits, tokens, offsets) if has_drafts else torch.zeros_like(slots)
        rows = torch.stack([slots, offsets, positions, tokens, ranks], 1)
        pieces = [torch.cat([rows, tails], 1).flatten()]
        pieces += [ids[slot, :length].long() for slot, length in whole.items()]
        flat: Ints = torch.cat(pieces).cpu().numpy()
        start = rows.shape[0] * (rows.shape[1] + self._width)
        found = []
        for each in flat[:start].reshape(len(rows), -1):
            slot, offset, position, draft, rank = each[:5].tolist()
            found.append(RowTokens(slot, offset, position, draft, rank, each[5:]))
        histories = {}
        for slot, piece in zip(whole, pieces[1:], strict=True):
            histories[slot] = flat[start : start + len(piece)]
            start += len(piece)
        return found, histories

    def history(self, slot: int, length: int | None = None) -> Ints:
        """So many tokens of a slot; None: all that it has."""
        if length is None:
            written: Any = self._states.total_len.gpu
            length = int(written[slot])
        ids: Any = self._states.all_token_ids.gpu
        history: Ints = ids[slot, :length].cpu().numpy().astype(np.int64)
        return history


def _ranks(logits: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """Where each row's draft stands among the logits of the row before it, int64 [rows]."""
    ranks = torch.zeros_like(tokens)
    drafts = tokens.clamp(min=0)[1:, None]
    for start in range(0, len(logits) - 1, _ROWS):
        before = logits[start : min(start + _ROWS, len(logits) - 1)]
        own = before.gather(1, drafts[start : start + len(before)])
        found = (before > own).sum(1).masked_fill(own[:, 0] == -torch.inf, NEVER)
        ranks[1 + start : 1 + start + len(before)] = found
    return ranks.masked_fill(offsets == 0, 0)
