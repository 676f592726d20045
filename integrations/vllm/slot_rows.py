"""The live rows of Model Runner V2: requests by slot, their tokens in the runner's own buffers.

With speculative decoding a request has a row for each of its drafted tokens, too: its history is
the request's with the drafts up to there. A row behind a draft that was forbidden before guidance,
or that ends the request, is no live row: nobody will sample from it. A draft that guidance masks is
followed: only the rank that scores will know which these are.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from guided_decode.growable import Ints
from guided_decode.integrations.vllm.request import Request
from guided_decode.integrations.vllm.request_ends import SamplingParams
from guided_decode.integrations.vllm.rows import Admit, LiveRow, Placed
from guided_decode.integrations.vllm.slot_tokens import RowTokens, SlotTokens
from guided_decode.prefix import PrefixHandle

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

logger = logging.getLogger("guided_decode")

# Steps after which a slot that no step names has ended: V2 does not say when a request ends.
_FORGET_AFTER = 16


@dataclass(slots=True)
class _Slot:
    """seen: the step that named it last. drafts: its rows behind one draft, two drafts, ..."""

    row: LiveRow
    seen: int
    drafts: list[LiveRow] = field(default_factory=list)


class SlotRows:
    """Requests by slot."""

    def __init__(
        self,
        admit: Admit,
        states: "LogitsProcRequestState",
        *,
        drafts: int = 0,
        rewrites: bool = False,
        overruled: bool = False,
    ) -> None:
        """
        Args:
            admit: what a request gets.
            states: the runner's buffers.
            drafts: the most drafted tokens of a request and step.
            rewrites: others may write histories too; each is read whole at every step.
            overruled: what acts after guidance may let through what is forbidden.
        """
        self._admit = admit
        self._states = states
        self._tokens = SlotTokens(states, drafts)
        self._rewrites = rewrites
        self._overruled = overruled
        self._slots: dict[int, _Slot] = {}
        # What slots asked for that no step has named for long.
        self._asleep: dict[int, Request] = {}
        self._step = 0
        # The step that rows were last read in, and whether the last ones were not its first: vLLM
        # verifies drafts in parts where all logits would take a GiB.
        self._read_in = -1
        self.goes_on = False
        self._abstained = 0

    def add(self, slot: int, params: SamplingParams) -> bool:
        """A request takes a slot; whether it asks for anything."""
        self._forget(slot)
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

    def _forget(self, slot: int) -> Request | None:
        """What the slot asked for, which its request has left."""
        known = self._slots.pop(slot, None)
        if known is None:
            return None
        if any(row.abstains for row in known.drafts):
            self._settle(known, self._tokens.history(slot))
        return known.row.request

    def advance(self) -> bool:
        """A step begins; whether slots were forgotten that no step has named for long."""
        self._step += 1
        ended = [i for i, slot in self._slots.items() if self._step - slot.seen > _FORGET_AFTER]
        for i in ended:
            # What it asked for stays, should it only have waited.
            request = self._forget(i)
            assert request is not None
            self._asleep[i] = request
        return bool(ended)

    def live(self) -> list[LiveRow]:
        """Every row of ours that has a slot, without those behind drafts."""
        return [slot.row for slot in self._slots.values()]

    def handles(self, batch: Any) -> list[PrefixHandle | None]:
        """As of `BatchRows`."""
        ours = (self._slots.get(slot) for slot in batch.idx_mapping_np.tolist())
        return [None if each is None else each.row.handle for each in ours]

    def take_abstained(self) -> int:
        """How many requests were ended behind a draft, since this was last asked."""
        abstained, self._abstained = self._abstained, 0
        return abstained

    def rows(self, context: "LogitsContext", logits: Tensor) -> list[Placed]:
        """The rows of this step that may be sampled from, with their histories up to date."""
        named = context.idx_mapping_np.tolist()
        for slot in named:
            if slot in self._asleep:
                self._wake(slot, self._asleep.pop(slot))
        if not any(slot in self._slots for slot in named):
            return []
        self.goes_on, self._read_in = self._read_in == self._step, self._step
        # Longer than the requests where a full CUDA graph pads the step.
        bounds = context.seq_lens_upper_bound_np[: len(named)].tolist()
        lengths = dict(zip(named, bounds, strict=True))
        unknown = {slot: n for slot, n in lengths.items() if self._wants_whole(slot, n)}
        given, histories = self._tokens.read(context, logits, unknown)
        placed: list[Placed] = []
        place = behind = -1
        for at, each in enumerate(given):
            if each.offset == 0:
                place, behind = place + 1, -1
            slot = self._slots.get(each.slot)
            # Behind a row that is not live there is no other.
            if slot is None or behind != each.offset - 1:
                continue
            if each.offset == 0:
                row = self._main(slot, each, histories)
            else:
                row = self._behind(slot, each)
            if row is not None:
                behind = each.offset
                row.place = place
                placed.append(Placed(at, row))
        return placed

    def _wants_whole(self, slot: int, length: int) -> bool:
        """Whether a history is read from its beginning. length: at least what it has."""
        known = self._slots.get(slot)
        if known is None or length < self._states.prefill_len.np[slot]:
            return False
        return self._rewrites or not len(known.row.history)

    def _main(self, slot: _Slot, given: RowTokens, histories: dict[int, Ints]) -> LiveRow | None:
        """The row without drafts; None while its prompt is being prefilled."""
        length = given.position + 1
        if length < self._states.prefill_len.np[given.slot]:
            return None
        slot.seen = self._step
        row, history = slot.row, histories.get(given.slot)
        known = len(row.history)
        if history is None and not _follow(row.history, length, given.tail):
            if 0 <= length - known < len(given.tail):
                logger.warning(
                    "a history was rewritten by a scheduler or sampler that is not vLLM's own: "
                    "from now on each is read whole at every step"
                )
                self._rewrites = True
            history = self._tokens.history(given.slot, length)
        if history is not None:
            version = row.history.version
            row.history.sync(history[:length])
            row.prompt_length = int(self._states.prompt_len.np[given.slot])
            if row.history.version != version:
                slot.drafts.clear()
        self._settle(slot, row.history.tokens)
        _take_over(slot, known)
        return row

    def _settle(self, slot: _Slot, history: Ints) -> None:
        """Counts a request that was ended behind a draft, once its history shows it."""
        for row in slot.drafts:
            if row.abstains:
                row.abstains = False
                tokens = row.history.tokens
                ended = [*tokens, row.request.end_token]
                self._abstained += np.array_equal(history[: len(ended)], ended)

    def _behind(self, slot: _Slot, given: RowTokens) -> LiveRow | None:
        """The row behind one draft more than the row before; None where that is never accepted."""
        main, draft, offset = slot.row, given.draft, given.offset
        if draft < 0 or draft in main.request.terminals:
            return None
        if given.is_forbidden and not self._overruled:
            return None
        before = main if offset == 1 else slot.drafts[offset - 2]
        if len(slot.drafts) < offset:
            new = LiveRow(main.request, PrefixHandle(), 0, main=main, is_prefilled=True)
            slot.drafts.append(new)
        row = slot.drafts[offset - 1]
        # What it had of the request's own history has not changed since.
        _branch(row.history, before.history.tokens, draft, max(0, len(row.history) - offset))
        row.prompt_length = main.prompt_length
        # Siblings are compared by what was accepted.
        row.request = replace(main.request, pruning=None) if main.request.pruning else main.request
        return row


def _follow(handle: PrefixHandle, length: int, tail: Ints) -> bool:
    """Appends what is new, if the history ends in `tail` and is else as it was; whether it did."""
    known, width = len(handle), len(tail)
    new = length - known
    compared = min(width - new, known)
    if not 0 <= new < width or not np.array_equal(
        tail[width - new - compared : width - new], handle.tokens[known - compared :]
    ):
        return False
    handle.extend(tail[width - new :])
    return True


def _branch(handle: PrefixHandle, before: Ints, draft: int, same: int) -> None:
    """Makes the handle `before` and the draft; its first `same` tokens are known to be right.

    The look-up goes on where it differs.
    """
    end = min(len(handle), len(before))
    differs = handle.tokens[same:end] != before[same:end]
    handle.rewind(same + int(differs.argmax()) if differs.any() else end)
    handle.extend(np.append(before[len(handle) :], draft))


def _take_over(slot: _Slot, known: int) -> None:
    """V of the texts that end in accepted drafts, which was read when they were drafts.

    known: tokens of the history at the last step.
    """
    main = slot.row
    main.passed = {}
    if not known:
        return
    tokens = main.history.tokens
    for offset, row in enumerate(slot.drafts[: len(tokens) - 1 - known], 1):
        length = len(row.history)
        if not known < length < len(tokens):
            continue
        # A sampler of others may have written something else than was drafted.
        drafted = slice(length - offset, length)
        if not np.array_equal(row.history.tokens[drafted], tokens[drafted]):
            continue
        value = row.trail.at(row.history, length)
        if value is not None:
            main.passed[length] = value
            main.trail.add(main.history, length, value)
