"""One step of an engine: siblings compared, rows guided, the same result on all its ranks."""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guided_decode.guidance.candidates import rows_beyond
from guided_decode.guidance.step import guide_rows, is_device_error
from guided_decode.integrations.vllm.metrics import Metrics, StepCounts
from guided_decode.integrations.vllm.own_trunk import OwnTrunk
from guided_decode.integrations.vllm.request import Request, SamplingParams, admit
from guided_decode.integrations.vllm.rows import LiveRow, Placed
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

    def step(self, logits: Tensor, rows: Sequence[Placed]) -> Tensor:
        """Writes the guided logits of these rows into `logits`, [rows, vocab], and returns it.

        rows: by their index in the logits, from the lowest.
        """
        if not rows:
            return logits
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
        self._read_values([rows[i] for i in known], batch, own.shape[-1])
        live = [row for _, row in rows]
        watched = [i for i in known if live[i].request.is_watched]
        ended = {i: token for i in watched if (token := _ends_now(live[i])) is not None}
        chosen = [i for i in known if i not in ended and live[i].request.is_guided]
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

    def _guide(self, own: Tensor, rows: list[LiveRow], chosen: list[int]) -> Tensor:
        """New logits, [rows, vocab]: guided where chosen, else the rows' own."""
        if not chosen:
            return own.clone()
        assert self.scorer is not None
        live = [rows[i] for i in chosen]
        for row in live:
            self.counts.wasted_rows += len(row.history) == row.seen
        self.counts.guided_rows += len(live)
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
        if self._tap is None and self._log is None:
            # Of all others nothing is read.
            rows = [placed for placed in rows if placed.row.request.is_watched]
        for _, row in rows:
            self._check_end(row, vocab)
        self.groups.begin_step(row.sibling for _, row in rows if row.sibling is not None)
        siblings = {id(row) for _, row in rows if row.request.pruning and self._is_due(row, vocab)}
        due = [p for p in rows if id(p.row) in siblings or self._is_read(p.row)]
        if self._tap is not None:
            due = [p for p in due if self._stands(p.row)]
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
            Arrival(p.row.sibling, p.row.response, values[id(p.row)])
            for p in due
            if id(p.row) in values and id(p.row) in siblings and p.row.sibling is not None
        ]
        self.counts.pruned_siblings += self.groups.record(arrivals)
        self._abstain([(p.row, values[id(p.row)]) for p in due if id(p.row) in values])
        if self._log is not None:
            logged = [p.row for p in due if id(p.row) in values and self._is_logged(p.row)]
            self._log.write([(row, values[id(row)]) for row in logged])

    def _abstain(self, values: Sequence[tuple[LiveRow, float]]) -> None:
        """Ends the rows whose value has fallen too low; they are counted once."""
        for row, value in values:
            row.trail.add(row.history, len(row.history), value)
            tokens = len(row.response)
            if row.request.abstains_at(tokens) and row.request.config.ends(value, tokens):
                self.counts.abstained_rows += not row.abstains
                row.abstains = True

    def _stands(self, row: LiveRow) -> bool:
        """Whether the hidden states that the tap saw are those of the row's whole history."""
        if self._trunk is not None and self._trunk.stands(row):
            return True
        # V1 also calls for prompts that it prefills in chunks: only a row that grew by the token of
        # its last step stands at its end for sure.
        return row.seen == len(row.history) - 1

    def _check_end(self, row: LiveRow, vocab: int) -> None:
        """A row whose end token the policy cannot write is not ended by its value."""
        request = row.request
        if request.end_token is not None and request.end_token >= vocab:
            self.counts.clamps += 1
            config = request.config.changed(abstain=None)
            row.request = replace(request, config=config, end_token=None)

    def _is_read(self, row: LiveRow) -> bool:
        """Whether the value is wanted for anything but siblings."""
        request, response = row.request, row.response
        # With async scheduling a response that is over is in one more step.
        if len(response) and int(response[-1]) in request.terminals:
            return False
        if request.abstains_at(len(response)):
            return not row.abstains
        # Of the policy's own hidden states it is there for the asking; of the last step it is not.
        falls = self._tap is not None and request.config.value_gate_fall is not None
        return falls or self._is_logged(row)

    def _is_due(self, row: LiveRow, vocab: int) -> bool:
        """Whether a sibling is at a boundary."""
        if not self._is_member(row, vocab) or row.sibling is None or row.sibling.is_pruned:
            return False
        return self.groups.is_due(row.sibling, len(row.response))

    def _is_logged(self, row: LiveRow) -> bool:
        length = len(row.history)
        return self._log is not None and row.seen != length and self._log.wants(len(row.response))

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

    def _values(self, due: Sequence[Placed], batch: int) -> dict[int, float]:
        """V(prefix) by the rows' ids; a row that cannot be scored has none."""
        if self._tap is not None:
            found = self._tap.values([at for at, _ in due], batch)
            usable = [row for _, row in due]
        else:
            assert self.scorer is not None
            scorer = self.scorer
            usable = [row for _, row in due if scorer.refusal(row.history, 0) is None]
            none = torch.empty(len(usable), 0, dtype=torch.int64)
            found = scorer.score([row.history for row in usable], none).baseline.tolist()
        pairs = zip(usable, found, strict=True)
        values = {id(row): value for row, value in pairs if math.isfinite(value)}
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


def _ends_now(row: LiveRow) -> int | None:
    """The token that ends this row now, or None."""
    if row.abstains:
        return row.request.end_token
    pruning = row.request.pruning
    is_pruned = row.sibling is not None and row.sibling.is_pruned
    return pruning.token if is_pruned and pruning is not None else None
