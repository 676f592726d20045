"""One step of an engine: siblings compared, rows guided, the same result on all its ranks."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guided_decode.guidance.candidates import rows_beyond
from guided_decode.guidance.step import guide_rows, is_device_error
from guided_decode.integrations.vllm.metrics import Metrics, StepCounts
from guided_decode.integrations.vllm.own_trunk import OwnTrunk
from guided_decode.integrations.vllm.request import Request, SamplingParams, admit
from guided_decode.integrations.vllm.rows import At, LiveRow, Placed
from guided_decode.integrations.vllm.server_config import ServerConfig
from guided_decode.integrations.vllm.siblings import Arrival, SiblingGroups
from guided_decode.integrations.vllm.trunk_tap import TrunkTap
from guided_decode.integrations.vllm.value_log import ValueLog
from guided_decode.scorer import Scorer
from guided_decode.stats import ScorerStats

logger = logging.getLogger("guided_decode")

Broadcast = Callable[[Tensor], Tensor]


class GuidedEngine:
    """Guides the rows that asked for it. One rank leads; the others take over its result."""

    def __init__(
        self,
        config: ServerConfig,
        scorer: Scorer | None = None,
        *,
        tap: TrunkTap | None = None,
        trunk: OwnTrunk | None = None,
        end_ids: Collection[int] = (),
        groups: bool = True,
        values: bool = True,
        broadcast: Broadcast | None = None,
        drafts: int = 0,
    ) -> None:
        """
        Args:
            config: the server's.
            scorer: guides and compares; None where a tap compares, and on the ranks that take over.
            tap: values of prefixes from the policy's own hidden states, in place of a scorer.
            trunk: guides by these values too, in place of a scorer; on all ranks.
            end_ids: what ends any request of this policy, besides its EOS.
            groups: whether siblings can be compared, the same on all ranks; not where they may be
                on several engines, and not by an implicit reward, which has no value of a prefix.
            values: whether prefixes have values, the same on all ranks.
            broadcast: hands a tensor of the leading rank to all; None with one rank.
            drafts: the most drafted tokens of a request and step.
        """
        self.config = config
        self.scorer = trunk if scorer is None and tap is not None else scorer
        self.groups = SiblingGroups()
        self.counts = StepCounts()
        self._tap = tap
        self._trunk = trunk
        self._end_ids = frozenset(end_ids)
        self._compares = groups
        self._values_prefixes = values
        self._broadcast = broadcast
        self._drafts = drafts
        self._goes_on = False
        self._members: list[LiveRow] = []
        source = tap if scorer is None else scorer
        self._leads = source is not None
        self._stats = ScorerStats() if source is None else source.stats
        self._metrics = None
        self._log = None
        if self._leads:
            self._metrics = Metrics(self.counts, self._stats, log_every=config.log_every)
            self._log = None if config.value_log is None else ValueLog(config)

    @property
    def trunk(self) -> OwnTrunk | None:
        """What guides by the policy's own trunk."""
        return self._trunk

    def admit(self, params: SamplingParams) -> Request | None:
        """What a request gets: within the limits, and never an error."""
        request, clamps = admit(
            params,
            self.config,
            self._end_ids,
            groups=self._compares,
            guides=self._trunk is not None or self.config.kind != "trunk-head",
            values=self._values_prefixes,
        )
        if clamps:
            if not self.counts.clamps:
                logger.warning("a request asked for more than it gets: %s", "; ".join(clamps))
            self.counts.clamps += len(clamps)
            if self._metrics is not None:
                # A request that gets nothing has no row, and so no step that would publish this.
                self._metrics.publish()
        return request

    def release(self, live: Collection[LiveRow]) -> None:
        """Forgets the siblings that are no longer in the batch."""
        if self._members:
            here = set(map(id, live))
            for row in self._members:
                if id(row) not in here and row.sibling is not None:
                    self.groups.leave(row.sibling)
            self._members = [row for row in self._members if id(row) in here]
        self._publish(len(live))

    def step(self, logits: Tensor, rows: Sequence[Placed], *, goes_on: bool = False) -> Tensor:
        """Writes the guided logits of these rows into `logits`, [rows, vocab], and returns it.

        rows: by their index in the logits, from the lowest. goes_on: the step has other rows, too,
        which came before.
        """
        if not rows:
            return logits
        self._goes_on = goes_on
        begun = time.perf_counter()
        every = len(rows) == len(logits)
        index = None if every else _on([i for i, _ in rows], logits.device)
        own = logits if index is None else logits.index_select(0, index)
        if self._leads:
            guided = self._lead(own, rows, len(logits))
        else:
            guided = torch.empty_like(own)
            if self._trunk is not None:
                self._trunk.begin([p for p in rows if p.row.handle is not None], len(logits))
                self._trunk.follow()
        if self._broadcast is not None:
            self._agree(own, works=True)
            guided = self._broadcast(guided.contiguous())
        if index is None:
            logits.copy_(guided)
        else:
            logits.index_copy_(0, index, guided)
        self.counts.seconds += time.perf_counter() - begun
        self._publish(len(rows))
        return logits

    def _lead(self, own: Tensor, rows: Sequence[Placed], batch: int) -> Tensor:
        """The step on the rank that leads. What fails here fails for all ranks, or for none."""
        try:
            try:
                return self._guided(own, rows, batch)
            finally:
                if self._trunk is not None:
                    self._trunk.end()
                elif self._tap is not None:
                    self._tap.forget()
        except Exception as error:
            if self.config.on_error == "passthrough" and not is_device_error(error):
                self._count_failure(len(rows), error)
                return own
            self._agree(own, works=False)
            raise

    def _agree(self, own: Tensor, *, works: bool) -> None:
        """Where a failure ends the engine, it ends all ranks: the one that leads says so first."""
        if self._broadcast is None or self.config.on_error != "raise":
            return
        status = self._broadcast(own.new_tensor([float(works)]))
        if not self._leads and not bool(status.item()):
            raise RuntimeError("the rank that scores failed: its log has the reason")

    def _guided(self, own: Tensor, rows: Sequence[Placed], batch: int) -> Tensor:
        known = [i for i, (_, row) in enumerate(rows) if row.handle is not None]
        if len(known) < len(rows):
            self._count_unknown(len(rows) - len(known))
        if self._trunk is not None:
            self._trunk.begin([rows[i] for i in known], batch)
        live = [row for _, row in rows]
        self._count_tokens([live[i] for i in known])
        self._read_values([rows[i] for i in known], batch, own.shape[-1])
        ended = {i: token for i in known if (token := _ends_now(live[i])) is not None}
        over = _behind_ends(live, ended)
        chosen = [i for i in known if live[i].request.is_guided and i not in over]
        if self._trunk is not None:
            chosen = [i for i in chosen if self._trunk.stands(live[i])]
        if chosen and self.config.on_error == "raise":
            chosen = self._not_masked(self._not_refused(chosen, live, own), own)
        guided = self._guide(own, live, chosen)
        if ended:
            guided[list(ended)] = -torch.inf
            guided[list(ended), list(ended.values())] = 0.0
        for i in known:
            live[i].seen = len(live[i].history)
        return guided

    def _not_refused(self, chosen: list[int], rows: list[LiveRow], own: Tensor) -> list[int]:
        """Those that the scorer can score: no request may end the engine."""
        assert self.scorer is not None
        most = self.config.max_top_k
        reasons = {i: self.scorer.refusal(rows[i].history, most) for i in chosen}
        for i in set(rows_beyond(own, self.scorer.vocab_size)).intersection(chosen):
            reasons[i] = "the scorer does not know the likeliest token"
        refused = [i for i, reason in reasons.items() if reason is not None]
        if refused:
            self._count_failure(len(refused), reasons[refused[0]])
        return [i for i in chosen if reasons[i] is None]

    def _not_masked(self, chosen: list[int], own: Tensor) -> list[int]:
        """Those with a token left: a request's own limits on tokens end no engine either."""
        if not chosen:
            return chosen
        left = (own[chosen] > -torch.inf).any(-1).tolist()
        if not all(left):
            self._count_failure(left.count(False), "a request leaves no token to sample")
        return [i for i, some in zip(chosen, left, strict=True) if some]

    def _count_tokens(self, rows: Sequence[LiveRow]) -> None:
        """What the last steps of these requests wrote."""
        for row in rows:
            new = len(row.history) - row.seen
            if row.main is None and row.seen and new > 0:
                self.counts.steps += 1
                self.counts.tokens += new

    def _guide(self, own: Tensor, rows: list[LiveRow], chosen: list[int]) -> Tensor:
        """New logits, [rows, vocab]: guided where chosen, else the rows' own."""
        if not chosen:
            return own.clone()
        assert self.scorer is not None
        live = [rows[i] for i in chosen]
        for row in live:
            self.counts.wasted_rows += len(row.history) == row.seen
        self.counts.guided_rows += len(live)
        self.counts.draft_rows += sum(row.main is not None for row in live)
        index = None if len(chosen) == len(rows) else _on(chosen, own.device)
        guided = guide_rows(
            self.scorer,
            own if index is None else own.index_select(0, index),
            [row.history for row in live],
            [row.request.config for row in live],
            terminals=[row.request.terminals for row in live],
            on_error=self.config.on_error,
            trails=[row.trail for row in live],
        )
        return guided if index is None else own.index_copy(0, index, guided)

    def _read_values(self, rows: Sequence[Placed], batch: int, vocab: int) -> None:
        """V(prefix) where it is due: siblings record it, and are pruned by it; the log has it; rows
        that abstain are ended by it."""
        for _, row in rows:
            row.trail.prompt_length = row.prompt_length
            self._check_end(row, vocab)
        siblings_here = (row.sibling for _, row in rows if row.sibling is not None)
        self.groups.begin_step(siblings_here, goes_on=self._goes_on)
        siblings = [At(p, n) for p in rows for n in self._boundaries(p.row, vocab)]
        logged = [At(p, n) for p in rows for n in self._logged(p.row)]
        due = [At(p, len(p.row.response)) for p in rows if self._is_read(p.row)]
        due = list(dict.fromkeys([*siblings, *logged, *due]))
        if self._tap is not None:
            due = [at for at in due if self._has_value(at)]
        if not due:
            return
        try:
            values = self._values(due, batch)
        except Exception as error:
            if self.config.on_error == "raise" or is_device_error(error):
                raise
            self._count_failure(len(due), error)
            return
        arrivals = [
            Arrival(at.placed.row.sibling, at.placed.row.response[: at.length], values[at])
            for at in siblings
            if at in values and at.placed.row.sibling is not None
        ]
        self.counts.pruned_siblings += self.groups.record(arrivals)
        self._abstain([(at.placed.row, value) for at, value in values.items() if at.is_end])
        _tell_the_rows_behind([row for _, row in rows])
        if self._log is not None:
            known = [at for at in logged if at in values]
            self._log.write([(at.placed.row, at.length, values[at]) for at in known])

    def _abstain(self, values: Sequence[tuple[LiveRow, float]]) -> None:
        """Ends the rows whose value has fallen too low; they are counted once.

        One behind drafts is counted when these are known to be accepted.
        """
        for row, value in values:
            row.trail.add(row.history, len(row.history), value)
            tokens = len(row.response)
            if row.request.abstains_at(tokens) and row.request.config.ends(value, tokens):
                self.counts.abstained_rows += row.main is None and not row.abstains
                row.abstains = True

    def _has_value(self, at: At) -> bool:
        """Whether V there is to be had without a scorer."""
        row = at.placed.row
        return self._stands(row) if at.is_end else row.prompt_length + at.length in row.passed

    def _stands(self, row: LiveRow) -> bool:
        """Whether the hidden states that the tap saw are those of the row's whole history."""
        if row.is_whole or (self._trunk is not None and self._trunk.stands(row)):
            return True
        # V1 also calls for prompts that it prefills in chunks: only a row that grew by the token of
        # its last step stands at its end for sure.
        return row.seen == len(row.history) - 1

    def _check_end(self, row: LiveRow, vocab: int) -> None:
        """A row whose end token the policy cannot write is not ended by its value."""
        request = row.request
        if request.end_token is not None and request.end_token >= vocab:
            self.counts.clamps += row.main is None
            config = request.config.changed(abstain=None)
            row.request = replace(request, config=config, end_token=None)

    def _is_read(self, row: LiveRow) -> bool:
        """Whether the value is wanted for anything but siblings and the log."""
        request, response = row.request, row.response
        # With async scheduling a response that is over is in one more step.
        if len(response) and int(response[-1]) in request.terminals:
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
        # With async scheduling a response that is over is in one more step.
        over = len(row.response) and int(row.response[-1]) in row.request.terminals
        if self._log is None or row.main is not None or row.seen == len(row.history):
            return []
        if over or row.abstains:
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
                self.counts.clamps += 1
                row.request = replace(row.request, pruning=None)
                return False
            self._members.append(row)
        return True

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
            assert self.scorer is not None
            scorer = self.scorer
            usable = [at for at in due if scorer.refusal(at.prefix, 0) is None]
            none = torch.empty(len(usable), 0, dtype=torch.int64)
            found = scorer.score([at.prefix for at in usable], none).baseline.tolist()
        pairs = zip(usable, found, strict=True)
        values = {at: value for at, value in pairs if math.isfinite(value)}
        if len(values) < len(due):
            self._count_failure(len(due) - len(values), "a prefix has no value")
        return values

    def _count_unknown(self, rows: int) -> None:
        if not self.counts.unguided_rows:
            logger.warning(
                "rows go on unguided because vLLM handed over no token ids: load the processor by "
                "--logits-processors, not as an installed plugin, and ask for guidance with token "
                "prompts only"
            )
        self.counts.unguided_rows += rows

    def _count_failure(self, rows: int, reason: object) -> None:
        if not self._stats.passthroughs:
            logger.warning("rows go on unguided because scoring failed: %s", reason)
        self._stats.add(passthroughs=rows)

    def _publish(self, live: int) -> None:
        if self._metrics is not None:
            self._metrics.publish(live_rows=live, groups=len(self.groups))


def _on(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers on a device, int64; unlike an index by a list, without a wait for it."""
    return torch.tensor(rows).to(device, non_blocking=True)


def _tell_the_rows_behind(rows: Sequence[LiveRow]) -> None:
    """Of the row before it a row behind a draft knows V, if that was read."""
    for before, row in itertools.pairwise(rows):
        if row.main is None:
            continue
        value = before.trail.at(before.history, len(before.history))
        if value is not None:
            row.trail.add(row.history, len(before.history), value)


def _behind_ends(rows: Sequence[LiveRow], ended: Collection[int]) -> set[int]:
    """The rows that are ended, and those behind them, which nobody samples from."""
    found = set(ended)
    over: set[int] = set()
    for i, row in enumerate(rows):
        # A row stands behind all before it of its request.
        main = row if row.main is None else row.main
        if i in ended:
            over.add(id(main))
        elif row.main is not None and id(main) in over:
            found.add(i)
    return found


def _ends_now(row: LiveRow) -> int | None:
    """The token that ends this row now, or None."""
    if row.abstains:
        return row.request.end_token
    pruning = row.request.pruning
    is_pruned = row.sibling is not None and row.sibling.is_pruned
    return pruning.token if is_pruned and pruning is not None else None
