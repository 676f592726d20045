"""One step of an engine: siblings compared, rows guided, the same result on all its ranks."""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from guided_decode.integrations.vllm.metrics import Metrics, StepCounts
from guided_decode.integrations.vllm.request import Pruning, Request, SamplingParams, admit
from guided_decode.integrations.vllm.rows import LiveRow, Placed
from guided_decode.integrations.vllm.server_config import ServerConfig
from guided_decode.integrations.vllm.siblings import Arrival, SiblingGroups
from guided_decode.scores import Scorer
from guided_decode.step import guide_rows, is_device_error

logger = logging.getLogger("guided_decode")

Broadcast = Callable[[Tensor], Tensor]


class GuidedEngine:
    """Guides the rows that asked for it. One rank scores; the others take over its result."""

    def __init__(
        self,
        config: ServerConfig,
        scorer: Scorer | None,
        *,
        end_ids: Collection[int] = (),
        groups: bool = True,
        broadcast: Broadcast | None = None,
    ) -> None:
        """
        Args:
            config: the server's.
            scorer: None on the ranks that only take over.
            end_ids: what ends any request of this policy, besides its EOS.
            groups: whether siblings can be compared; not where they may be on several engines.
            broadcast: hands a tensor of the scoring rank to all; None with one rank.
        """
        self.config = config
        self.scorer = scorer
        self.groups = SiblingGroups()
        self.counts = StepCounts()
        self._end_ids = frozenset(end_ids)
        # An implicit reward has no value of a prefix.
        self._compares = groups and (scorer is None or scorer.terminal != "included")
        self._broadcast = broadcast
        self._members: list[LiveRow] = []
        self._metrics = None
        if scorer is not None:
            self._metrics = Metrics(self.counts, scorer.stats, log_every=config.log_every)

    def admit(self, params: SamplingParams) -> Request | None:
        """What a request gets: within the limits, and never an error."""
        request, clamps = admit(params, self.config, self._end_ids, groups=self._compares)
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
        live = [row for _, row in rows]
        every = len(rows) == len(logits)
        index = None if every else torch.tensor([i for i, _ in rows]).to(logits.device)
        own = logits if index is None else logits[index]
        guided = torch.empty_like(own) if self.scorer is None else self._lead(own, live)
        if self._broadcast is not None:
            guided = self._broadcast(guided)
            if self.scorer is None and self.config.on_error == "raise" and guided.isnan().all():
                raise RuntimeError("the rank that scores failed: its log has the reason")
        if index is None:
            logits.copy_(guided)
        else:
            logits[index] = guided
        self.counts.seconds += time.perf_counter() - begun
        self._publish(len(rows))
        return logits

    def _lead(self, own: Tensor, rows: list[LiveRow]) -> Tensor:
        """The step on the rank that scores. What fails here fails for all ranks, or for none."""
        try:
            return self._guided(own, rows)
        except Exception as error:
            if self.config.on_error == "passthrough" and not is_device_error(error):
                self._count_failure(len(rows), error)
                return own
            if self._broadcast is not None:
                self._broadcast(torch.full_like(own, torch.nan))
            raise

    def _guided(self, own: Tensor, rows: list[LiveRow]) -> Tensor:
        known = [i for i, row in enumerate(rows) if row.handle is not None]
        if len(known) < len(rows):
            self._count_unknown(len(rows) - len(known))
        self._compare_siblings([rows[i] for i in known], own.shape[-1])
        pruned = {i: p.token for i in known if (p := _ends_now(rows[i])) is not None}
        chosen = [i for i in known if i not in pruned and rows[i].request.is_guided]
        guided = self._guide(own, rows, chosen)
        if pruned:
            guided[list(pruned)] = -torch.inf
            guided[list(pruned), list(pruned.values())] = 0.0
        return guided

    def _guide(self, own: Tensor, rows: list[LiveRow], chosen: list[int]) -> Tensor:
        """New logits, [rows, vocab]: guided where chosen, else the rows' own."""
        assert self.scorer is not None
        if not chosen:
            return own.clone()
        live = [rows[i] for i in chosen]
        for row in live:
            self.counts.wasted_rows += len(row.history) == row.scored_at
            row.scored_at = len(row.history)
        self.counts.guided_rows += len(live)
        every = len(chosen) == len(rows)
        guided = guide_rows(
            self.scorer,
            own if every else own[chosen],
            [row.history for row in live],
            [row.request.config for row in live],
            terminals=[row.request.terminals for row in live],
            on_error=self.config.on_error,
        )
        if every:
            return guided
        result = own.clone()
        result[chosen] = guided
        return result

    def _compare_siblings(self, rows: Sequence[LiveRow], vocab: int) -> None:
        """Siblings at a boundary record V(prefix); those that rank too low are pruned."""
        siblings = [row for row in rows if row.request.pruning and self._is_member(row, vocab)]
        due = [
            row
            for row in siblings
            if row.sibling is not None
            and not row.sibling.is_pruned
            and self.groups.is_due(row.sibling, len(row.response))
        ]
        if not due:
            return
        try:
            arrivals = self._arrivals(due)
        except Exception as error:
            if self.config.on_error == "raise" or is_device_error(error):
                raise
            self._count_failure(len(due), error)
            return
        self.counts.pruned_siblings += self.groups.record(arrivals)

    def _is_member(self, row: LiveRow, vocab: int) -> bool:
        """Whether the row has a place in its group; it takes one at its first step."""
        pruning = row.request.pruning
        assert pruning is not None
        if row.sibling is None:
            if pruning.token < vocab:
                row.sibling = self.groups.join(pruning, row.prompt, row.response)
            if row.sibling is None:
                self.counts.clamps += 1
                row.request = Request(row.request.config, row.request.terminals)
                return False
            self._members.append(row)
        return True

    def _arrivals(self, due: Sequence[LiveRow]) -> list[Arrival]:
        """The values at which these rows arrive; a row that cannot be scored does not arrive."""
        assert self.scorer is not None
        usable = [row for row in due if self.scorer.refusal(row.history, 0) is None]
        none = torch.empty(len(usable), 0, dtype=torch.int64)
        values = self.scorer.score([row.history for row in usable], none).baseline.tolist()
        arrivals = [
            Arrival(row.sibling, row.response, value)
            for row, value in zip(usable, values, strict=True)
            if row.sibling is not None and math.isfinite(value)
        ]
        if len(arrivals) < len(due):
            self._count_failure(len(due) - len(arrivals), "a sibling's prefix has no value")
        return arrivals

    def _count_unknown(self, rows: int) -> None:
        if not self.counts.unguided_rows:
            logger.warning(
                "rows go on unguided because vLLM handed over no token ids: load the processor by "
                "--logits-processors, not as an installed plugin, and ask for guidance with token "
                "prompts only"
            )
        self.counts.unguided_rows += rows

    def _count_failure(self, rows: int, reason: object) -> None:
        assert self.scorer is not None
        if not self.scorer.stats.passthroughs:
            logger.warning("rows go on unguided because scoring failed: %s", reason)
        self.scorer.stats.passthroughs += rows

    def _publish(self, live: int) -> None:
        if self._metrics is not None:
            self._metrics.publish(live_rows=live, groups=len(self.groups))


def _ends_now(row: LiveRow) -> Pruning | None:
    """The pruning that ends this row, or None."""
    return row.request.pruning if row.sibling is not None and row.sibling.is_pruned else None
