"""V(prefix) where a step has a use for it: siblings are compared by it, the log has it, rows whose
value fell too low are ended by it."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch

from guided_decode.guidance.step import is_device_error
from guided_decode.integrations.vllm.metrics import StepCounts
from guided_decode.integrations.vllm.own_trunk import OwnTrunk
from guided_decode.integrations.vllm.rows import At, LiveRow, Placed
from guided_decode.integrations.vllm.server_config import ServerConfig
from guided_decode.integrations.vllm.siblings import Arrival, SiblingGroups
from guided_decode.integrations.vllm.trunk_tap import TrunkTap
from guided_decode.integrations.vllm.value_log import ValueLog
from guided_decode.scorer import Scorer


class PrefixValues:
    """Reads them, on the rank that leads, and does what is done by them."""

    def __init__(
        self,
        config: ServerConfig,
        counts: StepCounts,
        fail: Callable[[int, object], None],
        *,
        scorer: Scorer | None,
        tap: TrunkTap | None,
        trunk: OwnTrunk | None,
        log: ValueLog | None,
        drafts: int,
    ) -> None:
        """
        Args:
            config: the server's.
            counts: of the engine.
            fail: is told of so many rows without a value, and why.
            scorer, tap, trunk, drafts: as of `GuidedEngine`; a tap is asked before the scorer.
            log: gets values, if there is one.
        """
        self.groups = SiblingGroups()
        self._config = config
        self._counts = counts
        self._fail = fail
        self._scorer = scorer
        self._tap = tap
        self._trunk = trunk
        self._log = log
        self._drafts = drafts
        self._members: list[LiveRow] = []

    @property
    def members(self) -> int:
        """Live rows that have a place in a group."""
        return len(self._members)

    def release(self, live: Collection[LiveRow]) -> None:
        """Forgets the siblings that are no longer in the batch."""
        if self._members:
            here = set(map(id, live))
            for row in self._members:
                if id(row) not in here and row.sibling is not None:
                    self.groups.leave(row.sibling)
            self._members = [row for row in self._members if id(row) in here]

    def read(
        self, rows: Sequence[Placed], batch: int, vocab: int, *, goes_on: bool = False
    ) -> None:
        """V(prefix) of the rows of a step, where it is due.

        Args:
            rows: those whose histories are known.
            batch, vocab: how many rows of logits the step has in all, and their width.
            goes_on: as of `GuidedEngine.step`.
        """
        for _, row in rows:
            row.trail.prompt_length = row.prompt_length
            row.trail.listens = row.request.values_id is not None
        if self._tap is None and self._log is None:
            # Of all others nothing is read here.
            rows = [placed for placed in rows if placed.row.request.is_watched]
        for _, row in rows:
            self._check_end(row, vocab)
        siblings_here = (row.sibling for _, row in rows if row.sibling is not None)
        self.groups.begin_step(siblings_here, goes_on=goes_on)
        siblings = [At(p, n) for p in rows for n in self._boundaries(p.row, vocab)]
        logged = [At(p, n) for p in rows for n in self._logged(p.row)]
        due = [At(p, len(p.row.response)) for p in rows if self._is_read(p.row)]
        due = list(dict.fromkeys([*siblings, *logged, *due]))
        if self._tap is not None:
            due = [at for at in due if self._has_value(at)]
        if not due:
            return
        values = self._values_if_any(due, batch)
        arrivals = [
            Arrival(at.placed.row.sibling, at.placed.row.response[: at.length], values[at])
            for at in siblings
            if at in values and at.placed.row.sibling is not None
        ]
        self._counts.pruned_siblings += self.groups.record(arrivals)
        self._abstain([(at.placed.row, value) for at, value in values.items() if at.is_end])
        _tell_the_rows_behind([row for _, row in rows])
        if self._log is not None:
            known = [at for at in logged if at in values]
            self._log.write([(at.placed.row, at.length, values[at]) for at in known])

    def at_ends(self, rows: Sequence[Placed], batch: int) -> dict[int, float]:
        """V at the ends of rows, by their ids; those where it is not to be had are left out.

        Raises: what the scorer raises, where that ends the engine.
        """
        due = [At(p, len(p.row.response)) for p in rows]
        if self._tap is not None:
            due = [at for at in due if self._has_value(at)]
        values = self._values_if_any(due, batch) if due else {}
        return {id(at.placed.row): value for at, value in values.items()}

    def _abstain(self, values: Sequence[tuple[LiveRow, float]]) -> None:
        """Ends the rows whose value has fallen too low; they are counted once.

        One behind drafts is counted when these are known to be accepted.
        """
        for row, value in values:
            row.trail.add(row.history, len(row.history), value)
            tokens = len(row.response)
            if row.request.abstains_at(tokens) and row.request.config.ends(value, tokens):
                self._counts.abstained_rows += row.main is None and not row.abstains
                row.abstains = True

    def _has_value(self, at: At) -> bool:
        """Whether V there is to be had without a scorer."""
        row = at.placed.row
        return self._stands(row) if at.is_end else row.prompt_length + at.length in row.passed

    def _stands(self, row: LiveRow) -> bool:
        """Whether the hidden states that the tap saw are those of the row's whole history."""
        if self._trunk is not None and self._trunk.stands(row):
            return True
        return row.samples_for_sure

    def _check_end(self, row: LiveRow, vocab: int) -> None:
        """A row whose end token the policy cannot write is not ended by its value."""
        request = row.request
        if request.end_token is not None and request.end_token >= vocab:
            self._counts.clamps += row.main is None
            config = request.config.changed(abstain=None)
            row.request = replace(request, config=config, end_token=None)

    def _is_read(self, row: LiveRow) -> bool:
        """Whether the value is wanted for anything but siblings and the log."""
        request, response = row.request, row.response
        if row.is_over:
            return False
        if request.abstains_at(len(response)):
            return not row.abstains
        if self._tap is None:
            return False
        # Of the policy's own hidden states it is there for the asking; of the last step it is not.
        compared = row.main is not None and row.main.request.pruning is not None
        logged = row.main is not None and self._log is not None
        return compared or logged or request.config.value_gate_fall is not None

    def _new_lengths(self, row: LiveRow, *, before: int = 0) -> Iterator[int]:
        """The lengths of its response that it has reached with the tokens of its last step.

        before: in its first step here, so many shorter ones too.
        """
        end = len(row.response)
        begin = row.seen - row.prompt_length if row.seen else end - 1 - before
        yield from range(max(0, min(begin + 1, end)), end + 1)

    def _boundaries(self, row: LiveRow, vocab: int) -> list[int]:
        """The boundaries at which a sibling is, or was before the last tokens of its last step."""
        if row.request.pruning is None or not self._is_member(row, vocab):
            return []
        sibling = row.sibling
        if sibling is None or sibling.is_pruned:
            return []
        # Who comes back may have passed one by the last tokens that it wrote before it left.
        lengths = self._new_lengths(row, before=self._drafts)
        return [n for n in lengths if self.groups.is_due(sibling, n)]

    def _logged(self, row: LiveRow) -> list[int]:
        """The lengths whose values the log has."""
        if self._log is None or row.main is not None or row.seen == len(row.history):
            return []
        if row.is_over or row.abstains:
            return []
        return [n for n in self._new_lengths(row) if self._log.wants(n)]

    def _is_member(self, row: LiveRow, vocab: int) -> bool:
        """Whether the row has a place in its group; it takes one at its first step."""
        pruning = row.request.pruning
        assert pruning is not None
        if row.sibling is None:
            if pruning.token < vocab:
                row.sibling = self.groups.join(pruning, row.prompt, row.response)
            if row.sibling is None:
                self._counts.clamps += 1
                row.request = replace(row.request, pruning=None)
                return False
            self._members.append(row)
        return True

    def _values_if_any(self, due: Sequence[At], batch: int) -> dict[At, float]:
        """As `_values`; nothing where the scorer fails and the engine is to go on."""
        try:
            return self._values(due, batch)
        except Exception as error:
            if self._config.on_error == "raise" or is_device_error(error):
                raise
            self._fail(len(due), error)
            return {}

    def _values(self, due: Sequence[At], batch: int) -> dict[At, float]:
        """V there; a prefix that cannot be scored has none."""
        if self._tap is not None:
            usable = [at for at in due if at.is_end]
            found = self._tap.values([at.placed.at for at in usable], batch) if usable else []
            passed = [at for at in due if not at.is_end]
            found += [
                at.placed.row.passed[at.placed.row.prompt_length + at.length] for at in passed
            ]
            usable += passed
        else:
            assert self._scorer is not None
            scorer = self._scorer
            usable = [at for at in due if scorer.refusal(at.prefix, 0) is None]
            none = torch.empty(len(usable), 0, dtype=torch.int64)
            found = scorer.score([at.prefix for at in usable], none).baseline.tolist()
        pairs = zip(usable, found, strict=True)
        values = {at: value for at, value in pairs if math.isfinite(value)}
        if len(values) < len(due):
            self._fail(len(due) - len(values), "a prefix has no value")
        return values


def _tell_the_rows_behind(rows: Sequence[LiveRow]) -> None:
    """Of the row before it a row behind a draft knows V, if that was read."""
    for before, row in itertools.pairwise(rows):
        if row.main is None:
            continue
        value = before.trail.at(before.history, len(before.history))
        if value is not None:
            row.trail.add(row.history, len(before.history), value)
