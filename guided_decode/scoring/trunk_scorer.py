"""The policy's own trunk as a scorer: its forwards give values and, where they are kept, the
hidden states from which the policy's next tokens follow."""

import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_decode.cache.prefix_cache import Placement
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel, Row
from guided_decode.scorer import Prefix, Scores
from guided_decode.scoring.asked import check_asked
from guided_decode.scoring.critic import CriticScorer
from guided_decode.scoring.trunk_head import TrunkHead


class Readings(NamedTuple):
    """What the trunk says of prefixes.

    hidden: [rows, hidden] of the trunk's dtype, what `NextLogits` and the value head read.
    values: float32 [rows], V(prefix).
    """

    hidden: Tensor
    values: Tensor


class _Riders(threading.local):
    """This thread's tokens that ride along: another's prefixes may be growing just now."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Prefix, int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Riders":
        return _Riders()

    def take(self) -> list[tuple[Prefix, int]]:
        """Those that wait, who then wait no longer."""
        taken, self.waiting = self.waiting, []
        return taken


class TrunkScorer(CriticScorer):
    """A scorer whose critic is a head on the policy's own hidden states.

    As a scorer beside the policy it is a critic like any other. A decoding loop that runs the
    policy on the same slot pool (`keep_hidden`, then `read`) gets a step's values and the next
    step's hidden states from one forward.
    """

    def __init__(self, model: PackedModel, head: TrunkHead, **conventions: Any) -> None:
        """Arguments as of `CriticScorer`; model: the policy's trunk."""
        super().__init__(model, head, **conventions)
        self._hidden: Tensor | None = None
        self._riders = _Riders()

    @property
    def trunk_head(self) -> TrunkHead:
        """The head, whose norm is the trunk's final one where hidden states come from before it."""
        assert isinstance(self.head, TrunkHead)
        return self.head

    @without_autograd
    def keep_hidden(self) -> None:
        """From now on each cached token's hidden state stays beside its keys: [capacity, hidden].

        Of keys and values of every layer that is a few per cent more.
        """
        with self.cache.lock:
            self._follow()
            if self._hidden is not None:
                return
            self.cache.clear()
            slots = len(self.cache.pool.keys[0])
            self._hidden = torch.empty(
                slots,
                self.trunk_head.hidden_size,
                dtype=self.model.model.dtype,
                device=self.model.device,
            )
            if self._graphs is not None:
                # What was captured does not write them.
                self._graphs.forget()

    def ride(self, prefix: Prefix, token: int) -> None:
        """Forwards a token that is chosen already with the candidates of the next `score`.

        Nothing but the cost of a later `read` depends on it.
        """
        self._riders.waiting.append((prefix, token))

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """As `CriticScorer.score`; tokens that ride along take no part in the answer."""
        check_asked(prefixes, candidates, self.vocab_size)
        with self.cache.lock:
            riders = self._riders.take()
            if not riders or not candidates.shape[1]:
                return super().score(prefixes, candidates)
            alone = candidates.new_full((len(riders), candidates.shape[1]), -1)
            alone[:, 0] = torch.tensor([token for _, token in riders])
            every = [*prefixes, *(prefix for prefix, _ in riders)]
            values, baseline = super().score(every, torch.cat([candidates, alone]))
            self.stats.add(rows_scored=-len(riders))
        return Scores(values[: len(prefixes)], baseline[: len(prefixes)])

    @without_autograd
    def read(self, prefixes: Sequence[Prefix]) -> Readings:
        """Hidden states and values at the last token of each prefix, and frees the losers' slots.

        What the cache holds is not forwarded again: after a step, the chosen candidates.

        Raises:
            ValueError: as `score`.
        """
        assert self._hidden is not None, "keep_hidden() comes before read()"
        with self.cache.lock:
            begun = time.perf_counter()
            self._follow()
            self._riders.take()
            rows = [self.model.row(each, i, self.skip_token, 0) for i, each in enumerate(prefixes)]
            parts: list[Readings] = []
            done = 0
            try:
                while done < len(rows):
                    parts.append(self._read_part(rows[done:]))
                    done += len(parts[-1].values)
            except BaseException:
                self.cache.clear()
                raise
            self._count(begun, 0)
            self.cache.drop_candidates()
        return Readings(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _read_part(self, rows: Sequence[Row]) -> Readings:
        """Readings of as many of the rows as fit the pool together, from the first."""
        self.cache.begin_batch()
        placements: list[Placement] = []
        for row in rows:
            placement = self.model.place(row, alone=not placements)
            if placement is None:
                break
            placements.append(placement)
        self._forward(placements)
        readings = self._readings([placement.last_slot for placement in placements])
        self.cache.end_batch()
        return readings

    def _readings(self, slots: list[int]) -> Readings:
        assert self._hidden is not None
        at = torch.from_numpy(np.array(slots, np.int64)).to(self.model.device, non_blocking=True)
        return Readings(self._hidden[at], self.cache.pool.values[at])

    def _write_values(self, batch: PackedBatch) -> None:
        hidden = self.model.forward(batch)
        self.cache.pool.values.index_copy_(0, batch.slots, self.head(hidden))
        if self._hidden is not None:
            self._hidden.index_copy_(0, batch.slots, hidden)
