"""One step of an engine: siblings compared, rows guided, the same result on all its ranks."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from guided_decode.guidance.candidates import rows_beyond
from guided_decode.guidance.step import guide_rows, is_device_error
from guided_decode.integrations.vllm.client_values.rows import ShownRows
from guided_decode.integrations.vllm.client_values.store import ValueStore
from guided_decode.integrations.vllm.metrics import Metrics, StepCounts
from guided_decode.integrations.vllm.own_trunk import OwnTrunk
from guided_decode.integrations.vllm.prefix_values import PrefixValues
from guided_decode.integrations.vllm.request import Request, admit
from guided_decode.integrations.vllm.request_ends import SamplingParams
from guided_decode.integrations.vllm.rows import LiveRow, Placed
from guided_decode.integrations.vllm.server_config import ServerConfig
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
        store: ValueStore | None = None,
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
            store: takes the values that clients asked for; None where nobody could fetch them, the
                same on all ranks.
            broadcast: hands a tensor of the leading rank to all; None with one rank.
            drafts: the most drafted tokens of a request and step.
        """
        self.config = config
        self.scorer = trunk if scorer is None and tap is not None else scorer
        self.counts = StepCounts()
        self._tap = tap
        self._trunk = trunk
        self._end_ids = frozenset(end_ids)
        self._compares = groups
        self._values_prefixes = values
        self._shown = None if store is None else ShownRows(store)
        self._broadcast = broadcast
        source = tap if scorer is None else scorer
        self._leads = source is not None
        self._stats = ScorerStats() if source is None else source.stats
        self._metrics = None
        log = None
        if self._leads:
            self._metrics = Metrics(self.counts, self._stats, log_every=config.log_every)
            log = None if config.value_log is None else ValueLog(config)
        self.values = PrefixValues(
            config,
            self.counts,
            self._count_failure,
            scorer=self.scorer,
            tap=tap,
            trunk=trunk,
            log=log,
            drafts=drafts,
        )

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
            shows=self._shown is not None,
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
        self.values.release(live)
        self._publish(len(live))

    def step(self, logits: Tensor, rows: Sequence[Placed], *, goes_on: bool = False) -> Tensor:
        """Writes the guided logits of these rows into `logits`, [rows, vocab], and returns it.

        rows: by their index in the logits, from the lowest. goes_on: the step has other rows, too,
        which came before.
        """
        if not rows:
            return logits
        begun = time.perf_counter()
        every = len(rows) == len(logits)
        index = None if every else _on([i for i, _ in rows], logits.device)
        own = logits if index is None else logits.index_select(0, index)
        if self._leads:
            guided = self._lead(own, rows, len(logits), goes_on=goes_on)
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

    def _lead(
        self, own: Tensor, rows: Sequence[Placed], batch: int, *, goes_on: bool = False
    ) -> Tensor:
        """The step on the rank that leads. What fails here fails for all ranks, or for none."""
        try:
            try:
                return self._guided(own, rows, batch, goes_on=goes_on)
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

    def _guided(self, own: Tensor, rows: Sequence[Placed], batch: int, *, goes_on: bool) -> Tensor:
        known = [i for i, (_, row) in enumerate(rows) if row.handle is not None]
        if len(known) < len(rows):
            self._count_unknown(len(rows) - len(known))
        if self._trunk is not None:
            self._trunk.begin([rows[i] for i in known], batch)
        live = [row for _, row in rows]
        lengths = {i: len(live[i].history) for i in known}
        self._count_tokens([live[i] for i in known], lengths.values())
        self.values.read([rows[i] for i in known], batch, own.shape[-1], goes_on=goes_on)
        watched = [i for i in known if live[i].request.is_watched]
        ended = {i: token for i in watched if (token := _ends_now(live[i])) is not None}
        behind = _behind_ends(live, ended) if ended else frozenset()
        over = behind.union(ended)
        chosen = [i for i in known if live[i].request.is_guided and i not in over]
        if self._trunk is not None:
            chosen = [i for i in chosen if self._trunk.stands(live[i])]
        if chosen and self.config.on_error == "raise":
            chosen = self._not_masked(self._not_refused(chosen, live, own), own)
        self.counts.wasted_rows += sum(lengths[i] == live[i].seen for i in chosen)
        guided = self._guide(own, live, chosen)
        if ended:
            guided[list(ended)] = -torch.inf
            guided[list(ended), list(ended.values())] = 0.0
        guides = {id(live[i]) for i in chosen}
        shown = [rows[i] for i in known if i not in behind]
        self._show(shown, guides, {id(live[i]) for i in ended}, batch)
        for i, length in lengths.items():
            live[i].seen = length
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

    def _count_tokens(self, rows: Sequence[LiveRow], lengths: Iterable[int]) -> None:
        """What the last steps of these requests wrote. lengths: of their histories."""
        new = [
            length - row.seen
            for row, length in zip(rows, lengths, strict=True)
            if length > row.seen > 0 and row.main is None
        ]
        self.counts.steps += len(new)
        self.counts.tokens += sum(new)

    def _guide(self, own: Tensor, rows: list[LiveRow], chosen: list[int]) -> Tensor:
        """New logits, [rows, vocab]: guided where chosen, else the rows' own."""
        if not chosen:
            return own.clone()
        assert self.scorer is not None
        live = [rows[i] for i in chosen]
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

    def _show(
        self, rows: Sequence[Placed], guided: Collection[int], ended: Collection[int], batch: int
    ) -> None:
        """Keeps what the step read of rows whose clients asked for it; reads V where it did not.

        guided, ended: ids of the rows that were guided, and of those that the step ends.
        """
        shown = [p for p in rows if p.row.request.values_id is not None]
        if not shown or self._shown is None:
            return
        unread = set(map(id, self._shown.unread([p.row for p in shown], guided, self.scorer)))
        values = self.values.at_ends([p for p in shown if id(p.row) in unread], batch)
        self._shown.keep([p.row for p in shown], values, guided, ended)

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
            self._metrics.publish_soon(live_rows=live, groups=len(self.values.groups))


def _on(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers on a device, int64; unlike an index by a list, without a wait for it."""
    return torch.tensor(rows).to(device, non_blocking=True)


def _behind_ends(rows: Sequence[LiveRow], ended: Collection[int]) -> frozenset[int]:
    """The rows behind those that are ended, which nobody samples from."""
    found = []
    over: set[int] = set()
    for i, row in enumerate(rows):
        # A row stands behind all before it of its request.
        main = row if row.main is None else row.main
        if row.main is not None and id(main) in over:
            found.append(i)
        elif i in ended:
            over.add(id(main))
    return frozenset(found)


def _ends_now(row: LiveRow) -> int | None:
    """The token that ends this row now, or None."""
    if row.abstains:
        return row.request.end_token
    pruning = row.request.pruning
    is_pruned = row.sibling is not None and row.sibling.is_pruned
    return pruning.token if is_pruned and pruning is not None else None
