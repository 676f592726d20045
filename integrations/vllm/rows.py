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

Admit = Callable[[SamplingParams], Request | None]

# Rows that left the batch whose last values are kept, should they only wait.
_KEEP_VALUES = 64


@dataclass(slots=True, eq=False)
class LiveRow:
    """A request that asked for something, while it is in the batch.

    handle: its history, prompt first; None where vLLM handed over none.
    prompt_length: tokens of the handle that are the prompt's.
    seen: tokens of its history at its last step.
    sibling: its place in its group, from its first step on.
    trail: what is known of its values. abstains: its value fell so low that it is ended.
    is_prefilled: whether it is in no step before its prompt was prefilled.
    main: of a row behind drafted tokens, which may be rejected, its request's row without them.
    passed: V where accepted drafts of its last step ended, by the tokens of its history.
    place: which request of the batch is its own in this step; None where each has one row, and it
        is its row's number.
    """

    request: Request
    handle: PrefixHandle | None
    prompt_length: int
    seen: int = 0
    sibling: Sibling | None = None
    trail: ValueTrail = field(default_factory=lambda: ValueTrail(0))
    abstains: bool = False
    is_prefilled: bool = False
    main: "LiveRow | None" = None
    passed: dict[int, float] = field(default_factory=dict)
    place: int | None = None

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


class At(NamedTuple):
    """A row's response when it had so many tokens."""

    placed: Placed
    length: int

    @property
    def is_end(self) -> bool:
        """Whether that is all that it has."""
        return self.length == len(self.placed.row.response)

    @property
    def prefix(self) -> PrefixHandle | torch.Tensor:
        """The prompt and so many tokens."""
        row = self.placed.row
        if self.is_end:
            return row.history
        return torch.from_numpy(row.history.tokens[: row.prompt_length + self.length])


class BatchRows:
    """V1 runner: requests by batch index, their outputs as lists that vLLM goes on writing to."""

    def __init__(self, admit: Admit, *, rewrites: bool = False) -> None:
        """rewrites: others may write histories too; each is read whole at every step."""
        self._admit = admit
        self._rewrites = rewrites
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
        return [Placed(i, self._followed(*each)) for i, each in sorted(self._rows.items())]

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

    def _followed(self, row: LiveRow, output: Sequence[int]) -> LiveRow:
        """The row with its handle at prompt + output; None where the output is not known."""
        handle = row.handle
        if handle is None:
            return row
        length, last, _ = handle.tip()
        known = length - row.prompt_length
        new = len(output) - known
        # Of a rewritten history the last token that is known may be another one.
        is_as_it_was = not known or (new >= 0 and output[known - 1] == last)
        if self._rewrites or not is_as_it_was or new not in (0, 1) or (new and output[-1] < 0):
            # Back from a preemption, or tokens were taken back after a failed transfer of the
            # cache, or others write histories too.
            ids = np.array([*row.prompt, *output], np.int64)
            if len(output) and int(ids[row.prompt_length :].min()) < 0:
                # Placeholders: this runner hands over no outputs.
                return LiveRow(row.request, None, 0)
            handle.sync(ids)
        elif new:
            handle.append(output[-1])
        return row
