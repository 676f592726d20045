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


class RowTokens(NamedTuple):
    """A row of the logits.

    slot: of its request. offset: how many drafted tokens there are before it. position: of its last
    token. draft: that token, if it is a draft; -1 is a placeholder. is_forbidden: whether the row
    before it came with that token at −inf. tail: the last tokens of the request's history, drafts
    left out.
    """

    slot: int
    offset: int
    position: int
    draft: int
    is_forbidden: bool
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
        forbidden = _forbidden(logits, tokens) if has_drafts else torch.zeros_like(slots)
        rows = torch.stack([slots, offsets, positions, tokens, forbidden], 1)
        pieces = [torch.cat([rows, tails], 1).flatten()]
        pieces += [ids[slot, :length].long() for slot, length in whole.items()]
        flat: Ints = torch.cat(pieces).cpu().numpy()
        start = rows.shape[0] * (rows.shape[1] + self._width)
        found = []
        for each in flat[:start].reshape(len(rows), -1):
            slot, offset, position, draft, is_forbidden = each[:5].tolist()
            found.append(RowTokens(slot, offset, position, draft, bool(is_forbidden), each[5:]))
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


def _forbidden(logits: Tensor, tokens: Tensor) -> Tensor:
    """Whether the row before came with each row's token at −inf, int64 [rows]."""
    before = logits[:-1].gather(1, tokens.clamp(min=0)[1:, None])[:, 0]
    return torch.cat([tokens.new_zeros(1), (before == -torch.inf).long()])
