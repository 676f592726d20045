"""The rows of one `generate` call after another: their histories, settings and values."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.rule import Configs
from guided_decode.guidance.value_trail import ValueTrail
from guided_decode.integrations.transformers.padding import (
    masked_ids,
    masked_lengths,
    unmasked_lengths,
)
from guided_decode.integrations.transformers.row_configs import row_configs
from guided_decode.integrations.transformers.token_ids import token_ids
from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Scorer


class _Generation(threading.local):
    """The generation in progress on this thread.

    handles, configs, trails: its rows' histories, settings and values. ids: int64 [rows, length],
    as they came last. width: tokens of its prompts, padding included. is_ahead: these ids are those
    of the next step, which a criterion saw before it. ended_at: as of `AbstentionCriteria`.
    """

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Generation":
        return _Generation()

    def clear(self) -> None:
        self.begin(torch.empty(0, 0, dtype=torch.int64), [], ())

    def begin(
        self, ids: Tensor, handles: list[PrefixHandle], configs: Sequence[GuidanceConfig]
    ) -> None:
        self.handles = handles
        self.configs = configs
        self.trails = [ValueTrail(len(handle)) for handle in handles]
        self.is_ahead = False
        self.ended_at = torch.full((len(handles),), -1)
        self.ids = ids
        self.width = ids.shape[1]


class RowFollower:
    """Knows the rows of the generation in progress by the ids that `generate` hands over.

    A call whose ids do not continue the last ones is a new generation; threads that share one have
    a generation each. An attention mask belongs to one batch of prompts: assign `attention_mask`
    before the next.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: Configs,
        *,
        pad_token_id: int | None,
        eos_token_id: int | Sequence[int] | None,
        attention_mask: Tensor | None,  # [prompts, width], 1 for tokens
        num_beams: int = 1,
        listens: bool = False,
    ) -> None:
        """Arguments as of `ValueGuidedLogitsProcessor`; listens: the rows keep their advantages."""
        self.scorer = scorer
        self.config = config
        self.pad_token_id = pad_token_id
        self.terminals = token_ids(eos_token_id)
        self.attention_mask = attention_mask
        self.num_beams = num_beams
        self.listens = listens
        # The mask that was used last, and the ids that it hid.
        self._padding: tuple[Tensor | None, set[int]] = (None, set())
        self._now = _Generation()

    @property
    def now(self) -> _Generation:
        """The generation in progress on this thread."""
        return self._now

    def reset(self) -> None:
        """Forgets the generation in progress on this thread."""
        self._now.clear()

    def ended(self, input_ids: Tensor) -> Tensor | None:
        """Which tokens of the responses are terminals, bool [rows, tokens]; None: there are none
        to look for."""
        if not self.terminals or input_ids.shape[1] == self._now.width:
            return None
        ends = torch.tensor(self.terminals, device=input_ids.device)
        return torch.isin(input_ids[:, self._now.width :], ends)

    def _follow(self, input_ids: Tensor) -> None:
        """Brings the handles up to date: one token more, beams reordered, or new prompts."""
        was_ahead, self._now.is_ahead = self._now.is_ahead, False
        if was_ahead and torch.equal(input_ids, self._now.ids):
            return
        parents = self._parents(input_ids) if self._continues(input_ids) else None
        if parents is None:
            self._begin(input_ids)
        else:
            self._reorder(parents)
            for handle, token in zip(self._now.handles, input_ids[:, -1].tolist(), strict=True):
                handle.append(token)
        self._now.ids = input_ids.clone()

    def follow_chosen(self, input_ids: Tensor) -> None:
        """The same for a criterion, which is asked behind a step, about what was chosen in it."""
        if not self._continues(input_ids):
            self._begin(input_ids[:, :-1].clone())
        self._follow(input_ids)
        self._now.is_ahead = True

    def _continues(self, input_ids: Tensor) -> bool:
        rows, length = self._now.ids.shape
        return (
            rows > 0
            and input_ids.shape == (rows, length + 1)
            and torch.equal(input_ids[:, : self._now.width], self._now.ids[:, : self._now.width])
        )

    def _parents(self, input_ids: Tensor) -> list[int] | None:
        """For each row the last step's row that it continues; None where there is none."""
        rows = len(input_ids)
        if torch.equal(input_ids[:, :-1], self._now.ids):
            return list(range(rows))
        # Beams are reordered within their prompt.
        group = self.num_beams if rows % self.num_beams == 0 and self.num_beams > 1 else rows
        now = input_ids[:, :-1].reshape(rows // group, group, -1)
        before = self._now.ids.view(rows // group, group, -1)
        same = (now[:, :, None] == before[:, None]).all(-1)
        if not bool(same.any(-1).all()):
            return None
        first = torch.arange(0, rows, group, device=same.device)[:, None]
        return (same.int().argmax(-1) + first).flatten().tolist()

    def _reorder(self, parents: list[int]) -> None:
        moved = any(
            self._now.configs[i] != self._now.configs[parent] for i, parent in enumerate(parents)
        )
        if moved:
            raise ValueError(
                "rows that continue each other came with different configs, as in beam search: "
                "pass num_beams, and one config a prompt"
            )
        taken: set[int] = set()
        handles, trails = [], []
        for parent in parents:
            handle, trail = self._now.handles[parent], self._now.trails[parent]
            if parent in taken:
                handle = PrefixHandle(handle.tokens)
                trail = ValueTrail(trail.prompt_length, listens=trail.listens)
            handles.append(handle)
            trails.append(trail)
            taken.add(parent)
        self._now.handles, self._now.trails = handles, trails

    def _begin(self, input_ids: Tensor) -> None:
        width = input_ids.shape[1]
        if width == 0:
            raise ValueError(
                "input_ids has no tokens: guidance needs the prompt's token ids, pass them instead "
                "of inputs_embeds"
            )
        pads = [width - length for length in self._prompt_lengths(input_ids)]
        rows = input_ids.tolist()
        configs = row_configs(
            self.config, len(rows), self._prompts(len(rows)), beams=self.num_beams
        )
        handles = [PrefixHandle(row[n:]) for row, n in zip(rows, pads, strict=True)]
        self._now.begin(input_ids, handles, configs)
        for trail in self._now.trails:
            trail.listens = self.listens

    def _prompts(self, rows: int) -> int:
        """How many prompts the rows belong to, as far as that is known."""
        if self.num_beams > 1 and rows % self.num_beams == 0:
            return rows // self.num_beams
        return rows if self.attention_mask is None else len(self.attention_mask)

    def _prompt_lengths(self, input_ids: Tensor) -> list[int]:
        """Tokens of each prompt without its left padding."""
        if self.attention_mask is None:
            return unmasked_lengths(
                input_ids,
                self.pad_token_id,
                self.scorer.bos_token_id,
                ends_are_known=bool(self.terminals),
            )
        lengths = masked_lengths(self.attention_mask, *input_ids.shape)
        hidden = masked_ids(input_ids, lengths)
        known_mask, padding = self._padding
        if known_mask is self.attention_mask and not hidden <= padding:
            raise ValueError(
                f"attention_mask hides token ids {sorted(hidden)[:8]}, where the last batch had "
                f"{sorted(padding)[:8]}: it belongs to other prompts; assign the new batch's mask "
                "to the processor's attention_mask"
            )
        self._padding = (self.attention_mask, hidden)
        return lengths
