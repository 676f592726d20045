"""The critic as a scorer: V of every candidate, one packed forward a step."""

import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from guided_decode.cache.prefix_cache import Placement, PrefixCache
from guided_decode.cache.riding import (
    Ride,
    RideWork,
    find_riders,
    fitting_riders,
    place_riders,
)
from guided_decode.forward.graphs import GraphedForward, usual_shapes
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.weights import Origin, WeightWatch
from guided_decode.growable import Ints
from guided_decode.kernels import value_head
from guided_decode.scorer import LogProbs, Prefix, Scorer, Scores, TerminalRule
from guided_decode.scoring.asked import Asked, check_asked, on_host
from guided_decode.scoring.closing import Closing
from guided_decode.scoring.implicit import LanguageModel
from guided_decode.scoring.score_parts import Numbered, ScoredPart, together
from guided_decode.stats import ScorerStats

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ValueHead:
    """weight [labels, hidden], bias [labels] or None, and what turns outputs into one value.

    inner: a layer before these.
    """

    weight: Tensor
    bias: Tensor | None
    transform: Callable[[Tensor], Tensor]
    inner: Callable[[Tensor], Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Values of hidden states [tokens, hidden], float32 [tokens]."""
        read = hidden if self.inner is None else self.inner(hidden)
        return self.transform(value_head(read, self.weight, self.bias))


class _Expected(threading.local):
    """What this thread has looked up already: another's prefixes are none of its own."""

    ride: Ride | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Expected":
        return _Expected()


class CriticScorer(Closing):
    """Scores candidates with a token-level critic, or a reward model read at the last token.

    The answer of `score` depends on its arguments alone; the cache changes what it costs. Threads
    may share a scorer: a lock (`cache.lock`, one a model) lets one call in at a time. A model in
    memory is followed: an optimizer step, another adapter, or other weights empty the cache.
    """

    scores_vocabulary = False

    def __init__(
        self,
        model: PackedModel,
        head: Head,
        *,
        terminal: TerminalRule = "baseline",
        skip_token: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        reward: Scorer | None = None,
        reference: LogProbs | None = None,
        graphs: bool | None = None,
        head_origin: Origin | None = None,
    ) -> None:
        """
        Args:
            model: the trunk.
            head: values, float32 [tokens], of hidden states [tokens, hidden]; a `ValueHead`, say.
            terminal: the terminal rule of the critic's family.
            skip_token: BOS, where the critic was trained without it: one leading one is dropped.
            bos_token_id: the token that begins a text, for those who look for padding.
            eos_token_id: the token at which a finished response is read.
            reward: the reward model of the "reward" terminal rule.
            reference: the model of kl_coef.
            graphs: steps of the usual shapes replay CUDA graphs; None: on a CUDA device. Never of a
                model on several devices, or of a sharded one, whose ranks talk in the middle of a
                forward.
            head_origin: where the head is, in memory; it is followed as the trunk is.
        """
        if terminal == "reward" and reward is None:
            raise ValueError(
                'terminal="reward" was given without a reward model: pass reward=, a checkpoint '
                "or a scorer that reads finished responses"
            )
        self.model = model
        self.head = head
        self.terminal = terminal
        self.skip_token = skip_token
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.reward = reward
        self.reference = reference
        self.stats = ScorerStats()
        self._head_origin = head_origin
        self._head_watch = WeightWatch(() if head_origin is None else head_origin.watched)
        # Of the model's changes, those that the head and the graphs have followed.
        self._followed = model.changes
        self._expected = _Expected()
        self._graphs: GraphedForward | None = None
        wanted = graphs if graphs is not None else model.device.type == "cuda"
        if wanted and model.can_be_graphed:
            capture = model.device.type == "cuda"
            self._graphs = GraphedForward(model, self._write_values, capture=capture)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        watch = self._head_watch
        memo[id(watch)] = watch
        return super().__deepcopy__(memo)

    def _packed_models(self) -> Iterator[PackedModel]:
        yield self.model

    def _models_beside(self) -> Iterator[PackedModel]:
        if isinstance(self.reward, Closing):
            yield from self.reward._packed_models()
        if isinstance(self.reference, LanguageModel):
            yield self.reference.model

    def _is_shared(self) -> bool:
        beside = isinstance(self.reward, Closing) and self.reward._is_shared()
        return self._head_origin is not None or beside or super()._is_shared()

    def __repr__(self) -> str:
        cache = self.cache
        return (
            f"{type(self).__name__}({self.model.name!r}, terminal={self.terminal!r}, cache_tokens="
            f"{cache.capacity}, {cache.nbytes / 2**20:.0f} MiB, {self.model.device})"
        )

    @property
    def cache(self) -> PrefixCache:
        return self.model.cache

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def graphs(self) -> GraphedForward | None:
        """The CUDA graphs of its forwards, where it has any: whether they work, and counters."""
        return self._graphs

    @without_autograd
    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """Values of candidates after their prefixes.

        Args:
            prefixes: rows of unpadded token ids, or handles.
            candidates: int64 [rows, k], padded with -1.

        Returns:
            Scores on the critic's device: values float32 [rows, k], NaN where padded, and
            baseline float32 [rows].

        Raises:
            ValueError: an empty prefix, a token outside the vocabulary, more positions than the
                critic has, or a row that does not fit the cache.
        """
        check_asked(prefixes, candidates, self.vocab_size)
        with self.cache.lock:
            begun = time.perf_counter()
            self._follow()
            # The step's one wait for the device before its forward.
            asked, (lowest, highest) = on_host(candidates)
            self.model.check_vocabulary(lowest, highest, "candidate")
            ride = self._ride(prefixes, asked)
            rows: Sequence[Numbered] = ()
            if ride is None or len(ride.rows) < len(prefixes):
                riding = () if ride is None else ride.rows.tolist()
                others = sorted(set(range(len(prefixes))).difference(riding))
                rows = self._rows(prefixes, asked, others)
            parts: list[ScoredPart] = []
            try:
                while ride is not None or rows:
                    parts.append(self._score_part(rows, asked, ride))
                    rows, ride = parts[-1].left, None
            except BaseException:
                # Slots that were handed out may not have been written.
                self.cache.clear()
                raise
            self._count(begun, len(prefixes))
        if not parts:
            empty = torch.empty(candidates.shape, dtype=torch.float32, device=self.model.device)
            return Scores(empty, empty.new_empty(len(empty)))
        return together(parts)

    @contextmanager
    def expecting(self, prefixes: Sequence[Prefix]) -> Iterator[None]:
        """Looks prefixes up that this thread scores next, all or some of them, while it still waits
        for their candidates. No handle among them may change inside.

        Nothing but the time between candidates and answer depends on it.
        """
        with self.cache.lock:
            self._expected.ride = find_riders(self.cache, prefixes, self._skipped)
        try:
            yield
        finally:
            self._expected.ride = None

    @without_autograd
    def prepare(self, rows: int, candidates: int, prefix: int) -> None:
        """Captures the CUDA graphs of usual steps now, and not while requests wait; where there
        are none this does nothing.

        Args:
            rows: the most rows of a step.
            candidates: of each row.
            prefix: the most tokens of a prefix.
        """
        if self._graphs is None:
            return
        with self.cache.lock:
            self._follow()
            shapes = usual_shapes(rows, candidates, prefix)
            self._graphs.prepare(shapes, self.cache.tables.table, self.cache.pool)

    def _follow(self) -> None:
        """Reads a model in memory again that is not what it was."""
        self.model.begin_call()
        if self._followed == self.model.changes and not self._head_watch.changed():
            return
        # Whatever comes of it, no answer may come from what was cached before.
        self.cache.clear()
        if self._head_origin is not None:
            watch = WeightWatch(self._head_origin.watched)
            self.head = self._head_origin.read(self.model.model)
            self._head_watch = watch
        if self._graphs is not None:
            self._graphs.forget()
        self._followed = self.model.changes

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why `score` would refuse this prefix with so many candidates, or None."""
        reasons = [self.model.refusal(prefix, self.skip_token, candidates)]
        if self.reward is not None:
            reasons.append(self.reward.refusal(prefix, 1))
        if self.reference is not None:
            reasons.append(self.reference.refusal(prefix, candidates))
        return next((reason for reason in reasons if reason is not None), None)

    def _ride(self, prefixes: Sequence[Prefix], asked: Asked) -> Ride | None:
        """The rows that go on by a candidate, nearly all of a step: they were checked before."""
        ride = self._expected.ride
        if ride is not None:
            ride = ride.among(prefixes) if ride.clock == self.cache.tree.clock else None
        if ride is None:
            ride = find_riders(self.cache, prefixes, self._skipped)
        if ride is None:
            return None
        most = self.model.max_positions
        positions = self.cache.capacity if most is None else most
        return fitting_riders(self.cache, ride, asked.ids, asked.repeats, positions)

    @property
    def _skipped(self) -> int:
        """The token that is skipped, as an id; -1: none."""
        return -1 if self.skip_token is None else self.skip_token

    def _rows(
        self, prefixes: Sequence[Prefix], asked: Asked, wanted: Iterable[int]
    ) -> list[Numbered]:
        """These rows of a call, checked."""
        rows = []
        for i in wanted:
            given, count = prefixes[i], int(np.count_nonzero(asked.ids[i] >= 0))
            # Repeated candidates take one slot; they are rare enough to count only near the limit.
            if isinstance(given, Sized) and len(given) + count > self.cache.capacity:
                count = len(asked.of_row(i)[0])
            rows.append((i, self.model.row(given, i, self.skip_token, count)))
        return rows

    def _score_part(self, rows: Sequence[Numbered], asked: Asked, ride: Ride | None) -> ScoredPart:
        """Scores those that ride, and as many of the rows as fit the pool with them."""
        self.cache.begin_batch()
        riders = None
        if ride is not None:
            riders = place_riders(self.cache, ride, asked.ids, padded=asked.padded)
            if riders is None:
                whole = self._rows(ride.prefixes, asked, ride.rows.tolist())
                rows = sorted([*rows, *whole], key=operator.itemgetter(0))
        placements: list[Placement] = []
        slots = np.full(asked.ids.shape, -1, np.int64)
        last_slots = np.full(len(slots), -1, np.int64)
        if ride is not None and riders is not None:
            slots[ride.rows], last_slots[ride.rows] = riders.slots, riders.last_slots
        for i, row in rows:
            own, places = asked.of_row(i)
            alone = riders is None and not placements
            placement = self.model.place(row, own, alone=alone, rides=self._skipped)
            if placement is None:
                break
            placements.append(placement)
            slots[i, asked.ids[i] >= 0] = placement.candidate_slots[places]
            last_slots[i] = placement.last_slot
        self._forward(placements, riders)
        done = (last_slots >= 0).nonzero()[0]
        if len(done) < len(slots):
            slots, last_slots = slots[done], last_slots[done]
        scores = self._gather(slots, last_slots, padded=asked.padded)
        self.cache.end_batch()
        return ScoredPart(done, scores, rows[len(placements) :])

    def _forward(self, placements: list[Placement], riders: RideWork | None = None) -> None:
        for batch in self.model.batches(placements, riders):
            begun = time.perf_counter()
            if self._graphs is None or not self._graphs.run(batch):
                self._write_values(batch)
            self.stats.add(forwards=1, forward_seconds=time.perf_counter() - begun)
        self.stats.add(
            prefix_tokens=sum(len(placement.work.prefix) for placement in placements),
            candidate_tokens=sum(len(placement.work.candidates) for placement in placements)
            + (0 if riders is None else riders.tokens),
            cache_hits=sum(placement.hits for placement in placements)
            + (0 if riders is None else int(riders.lengths.sum())),
        )

    def _write_values(self, batch: PackedBatch) -> None:
        """One forward; each token's value goes to its slot."""
        values = self.head(self.model.forward(batch))
        self.cache.pool.values.index_copy_(0, batch.slots, values)

    def _gather(self, slots: Ints, last_slots: Ints, *, padded: bool) -> Scores:
        """Values of candidates' slots, [n, k], -1 where padded, and of the last tokens', [n]."""
        # Baselines begin at a multiple of 16 bytes: kernels are compiled for that.
        size, start = slots.size, -(-slots.size // 4) * 4
        pool, read = self.cache.pool, np.empty(start + len(slots), np.int64)
        # Padding is read where the pool has NaN.
        nowhere = len(pool.values) - 1
        read[:size], read[size:start], read[start:] = slots.ravel(), nowhere, last_slots
        if padded:
            read[read < 0] = nowhere
        at = torch.from_numpy(read).to(pool.device, non_blocking=True)
        values = pool.values.index_select(0, at)
        return Scores(values[:size].view(slots.shape), values[start:])

    def _count(self, begun: float, rows: int) -> None:
        self.stats.add(
            evictions=self.cache.tree.take_evicted(),
            rows_scored=rows,
            seconds=time.perf_counter() - begun,
        )
