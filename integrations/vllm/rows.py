"""The live rows of an engine: which requests stand where, and their token histories.

Nothing here is kept in step with the scheduler: a history is what vLLM hands over, read again
where a handle does not fit it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from guided_decode.growable import Ints
from guided_decode.guidance.value_trail import ValueTrail
from guided_decode.integrations.vllm.request import Request
from guided_decode.integrations.vllm.request_ends import SamplingParams
from guided_decode.integrations.vllm.siblings import Sibling
from guided_decode.prefix import PrefixHandle

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

Admit = Callable[[SamplingParams], Request | None]

# Rows that left the batch whose last values are kept, should they only wait.
_KEEP_VALUES = 64
# Steps after which a slot that no step names has ended: V2 does not say when a request ends.
_FORGET_AFTER = 16


@dataclass(slots=True, eq=False)
class LiveRow:
    """A request that asked for something, while it is in the batch.

    handle: its history, prompt first; None where vLLM handed over none.
    prompt_length: tokens of the handle that are the prompt's.
    seen: tokens of its history at its last step.
    sibling: its place in its group, from its first step on.
    trail: what is known of its values. abstains: its value fell so low that it is ended.
    is_prefilled: whether it is in no step before its prompt was prefilled.
    """

    request: Request
    handle: PrefixHandle | None
    prompt_length: int
    seen: int = 0
    sibling: Sibling | None = None
    trail: ValueTrail = field(default_factory=lambda: ValueTrail(0))
    abstains: bool = False
    is_prefilled: bool = False

    @property
    def has_grown(self) -> bool:
        """Whether it grew by the token of its last step."""
        return self.seen == len(self.history) - 1

    @property
    def samples_for_sure(self) -> bool:
        """Whether the token that this step chooses is known to be kept.

        V1 also calls for prompts that it prefills in chunks, with the whole prompt as history, and
        drops what is sampled behind all chunks but the last.
        """
        return self.is_prefilled or self.has_grown

    @property
    def history(self) -> PrefixHandle:
        """The handle of a row that has one."""
        assert self.handle is not None
        return self.handle

    @property
    def is_over(self) -> bool:
        """With async scheduling a response that is over is in one more step."""
        response = self.response
        return bool(len(response)) and int(response[-1]) in self.request.terminals

    @property
    def has_values_to_keep(self) -> bool:
        """Whether its next step compares V with that of its last one."""
        return self.handle is not None and self.request.config.value_gate_fall is not None

    @property
    def prompt(self) -> Ints:
        return self.history.tokens[: self.prompt_length]

    @property
    def response(self) -> Ints:
        return self.history.tokens[self.prompt_length :]


class Placed(NamedTuple):
    """A live row, and which row of the logits it is."""

    at: int
    row: LiveRow


class BatchRows:
    """V1 runner: requests by batch index, their outputs as lists that vLLM goes on writing to."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit
        self._rows: dict[int, tuple[LiveRow, Sequence[int]]] = {}
        # vLLM takes a request out of the batch for every step that does not schedule it.
        self._left: deque[LiveRow] = deque(maxlen=_KEEP_VALUES)

    def update(self, batch_update: "BatchUpdate | None") -> bool:
        """Follows the batch; whether any of our rows came, went, or moved."""
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        before = self.live() if batch_update else []
        changed = process_dict_updates(self._rows, batch_update, self._new)
        if changed:
            here = set(map(id, self.live()))
            self._left.extend(
                row for row in before if id(row) not in here and row.has_values_to_keep
            )
        return changed

    def live(self) -> list[LiveRow]:
        """Every row of ours in the batch."""
        return [row for row, _ in self._rows.values()]

    def rows(self) -> list[Placed]:
        """The rows of this step, with their histories up to date."""
        return [Placed(i, _followed(row, out)) for i, (row, out) in sorted(self._rows.items())]

    def handles(self, batch: Any) -> list[PrefixHandle | None]:
        """The histories of the runner's batch, before its step; None where a row is not ours."""
        ours = (self._rows.get(i) for i in range(batch.num_reqs))
        return [None if each is None else each[0].handle for each in ours]

    def _new(
        self, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> tuple[LiveRow, Sequence[int]] | None:
        request = self._admit(params)
        if request is None:
            return None
        if prompt is None:
            return LiveRow(request, None, 0), output
        row = LiveRow(request, PrefixHandle(prompt), len(prompt))
        known = self._returned(row, output) if request.config.value_gate_fall is not None else None
        if known is not None:
            row.handle, row.trail = known.handle, known.trail
        return row, output

    def _returned(self, row: LiveRow, output: Sequence[int]) -> LiveRow | None:
        """Who left with the history that this row begins with, and is no longer kept; or None.

        By its tokens: a request that comes back may have other lists than it left with.
        """
        for known in self._left:
            length = len(known.response)
            same = (
                known.prompt_length == row.prompt_length
                and length <= len(output)
                and np.array_equal(known.response, output[:length])
                and np.array_equal(known.prompt, row.prompt)
            )
            if same:
                self._left.remove(known)
                return known
        return None


def _followed(row: LiveRow, output: Sequence[int]) -> LiveRow:
    """The row with its handle at prompt + output; None where the output is not known."""
    handle = row.handle
    if handle is None:
        return row
    known = len(handle) - row.prompt_length
    if len(output) == known + 1 and output[-1] >= 0:
        handle.append(output[-1])
    elif len(output) != known or (known and output[-1] != handle.tokens[-1]):
        # Back from a preemption, or tokens were taken back after a failed transfer of the cache.
        ids = np.array([*row.prompt, *output], np.int64)
        if len(output) and int(ids[row.prompt_length :].min()) < 0:
            # Placeholders: this runner hands over no outputs.
            return LiveRow(row.request, None, 0)
        handle.sync(ids)
    return row


@dataclass(slots=True)
class _Slot:
    row: LiveRow
    seen: int


class SlotRows:
    """V2 runner: requests by slot, their tokens in the runner's own buffers."""

    def __init__(self, admit: Admit, states: "LogitsProcRequestState") -> None:
        self._admit = admit
        self._states = states
        self._slots: dict[int, _Slot] = {}
        # What slots asked for that no step has named for long.
        self._asleep: dict[int, Request] = {}
        self._step = 0

    def add(self, slot: int, params: SamplingParams) -> bool:
        """A request takes a slot; whether it asks for anything."""
        self._slots.pop(slot, None)
        self._asleep.pop(slot, None)
        request = self._admit(params)
        if request is None:
            return False
        self._wake(slot, request)
        return True

    def _wake(self, slot: int, request: Request) -> None:
        self._slots[slot] = _Slot(
            LiveRow(request, PrefixHandle(), 0, is_prefilled=True), self._step
        )

    def advance(self) -> bool:
        """A step begins; whether slots were forgotten that no step has named for long."""
        self._step += 1
        ended = [i for i, slot in self._slots.items() if self._step - slot.seen > _FORGET_AFTER]
        for i in ended:
            # What it asked for stays, should it only have waited.
            self._asleep[i] = self._slots.pop(i).row.request
        return bool(ended)

    def live(self) -> list[LiveRow]:
        """Every row of ours that has a slot."""
        return [slot.row for slot in self._slots.values()]

    def handles(self, batch: Any) -> list[PrefixHandle | None]:
        """As of `BatchRows`."""
        ours = (self._slots.get(slot) for slot in batch.idx_mapping_np.tolist())
        return [None if each is None else each.row.handle for each in ours]

    def rows(self, context: "LogitsContext") -> list[Placed]:
        """The rows that sample in this step, with their histories up to date: one blocking copy."""
        lengths = context.seq_lens_upper_bound_np
        prefills = self._states.prefill_len.np
        found: list[tuple[int, int, int]] = []
        for index, slot in enumerate(context.idx_mapping_np.tolist()):
            if slot in self._asleep:
                self._wake(slot, self._asleep.pop(slot))
            if slot in self._slots and lengths[index] >= prefills[slot]:
                self._slots[slot].seen = self._step
                found.append((index, slot, int(lengths[index])))
        self._follow(found, context)
        return [Placed(index, self._slots[slot].row) for index, slot, _ in found]

    def _follow(self, found: list[tuple[int, int, int]], context: "LogitsContext") -> None:
        ids: Any = self._states.all_token_ids.gpu
        pieces: list[torch.Tensor] = []
        readers: list[tuple[PrefixHandle, int, bool]] = []
        for index, slot, length in found:
            row = self._slots[slot].row
            known = len(row.history)
            if known == length:
                continue
            is_next = 0 < known == length - 1
            if is_next:
                pieces.append(context.input_ids[index : index + 1].long())
            else:
                pieces.append(ids[slot, :length].long())
                row.prompt_length = int(self._states.prompt_len.np[slot])
            readers.append((row.history, len(pieces[-1]), is_next))
        if not pieces:
            return
        tokens, start = torch.cat(pieces).cpu().numpy(), 0
        for handle, count, is_next in readers:
            piece = tokens[start : start + count]
            start += count
            handle.extend(piece) if is_next else handle.sync(piece)
