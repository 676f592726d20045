"""Models that are sharded over processes: one brain, many shards.

The leader, rank 0, alone has the prefix tree, the bookkeeping of slots and the tables that follow
from it. It hands each packed batch to the followers, who run the same forward on their shard of the
weights and of the pool. They agree twice a forward: before its first collective, when all have what
they need, and after its last. What fails on one rank in between is caught up with there, so that
the call ends on all and the next one works. A rank that is gone, or that does not answer, closes
the scorer.
"""

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from traceback import clear_frames
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from guided_decode.cache.slot_tables import Piece, SlotTables
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.ranks import (
    CALLING,
    FAILED,
    LOADING,
    Ranks,
    ShardError,
    failed_elsewhere,
    same_everywhere,
)
from guided_decode.forward.shard_orders import Forward, Order, encoded
from guided_decode.forward.tensor_parallel import Collectives, collectives_of

logger = logging.getLogger("guided_decode")

_END = np.array([Order.END, 0], np.int64)
_OPEN: "weakref.WeakSet[Shards]" = weakref.WeakSet()


class Shards:
    """The sharded models of one scorer on this rank, and the ranks that share them.

    closed: why there are no more calls, or None. Whoever calls holds `lock`.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.lock = threading.RLock()
        self.closed: str | None = None
        self._settled = True
        self.models: list[PackedModel] = []
        self._collectives: list[Collectives] = []
        # Of the leader's tables, by model: what the followers have not been told yet, and of which.
        self._writes: list[list[list[Piece]]] = []
        self._tables: list[SlotTables] = []
        _OPEN.add(self)
        self._forgotten: Any = None
        if self.leads:
            self._forgotten = weakref.finalize(self, _tell_the_end, self.ranks)
            # At the end of the process `close_all` does it, in time.
            self._forgotten.atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            f"a scorer that is sharded over {self.ranks.world} processes cannot be copied: the "
            "others have one cache for it; call load_scorer on all ranks instead"
        )

    @property
    def leads(self) -> bool:
        return self.ranks.leads

    # Loading, which all ranks do alike.

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """What fails in the block on one rank fails on all."""
        try:
            yield
        except ShardError:
            # All ranks know it.
            self.close_here("it was not loaded")
            raise
        except BaseException as error:
            with contextlib.suppress(ShardError):
                self.ranks.vote(error, patience=FAILED)
            self.close_here("it was not loaded")
            raise
        self.agree()

    def agree(self) -> None:
        """Goes on when all ranks have come as far. Raises ShardError: one of them failed."""
        verdict = self.ranks.vote(None, patience=LOADING)
        if verdict.failures:
            raise failed_elsewhere(verdict.failures)

    def begin(self, model: Any, **settings: object) -> None:
        """Before the first forward of a model. Raises ShardError: others have another one."""
        self.agree()
        config = model.config.get_text_config()
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        named = [("class", type(model).__name__), ("dtype", model.dtype)]
        named += [(size, getattr(config, size, None)) for size in sizes]
        same_everywhere(self.ranks, [*named, *settings.items()])

    def add(self, model: PackedModel) -> None:
        """Takes a model in: the leader's forwards of it run on all ranks from now on."""
        self.models.append(model)
        self._collectives.append(collectives_of(model.model, model.mesh))
        self._writes.append([])
        self._tables.append(model.cache.tables)
        if self.leads:
            model.leader = self

    # The leader's calls.

    def wrote(self, model: PackedModel, written: list[Piece]) -> None:
        """Notes what the leader's slot tables were told, for the next forward.

        Raises ShardError: the scorer is closed.
        """
        self._check_open()
        number, tables = self.models.index(model), model.cache.tables
        if tables is not self._tables[number]:
            # Rows of tables that were given up may be none of the new ones.
            self._tables[number], self._writes[number] = tables, []
        if written:
            self._writes[number].append(written)

    def forward(self, model: PackedModel, batch: PackedBatch, read: Tensor | None) -> Tensor:
        """`model.run` on all ranks.

        Raises ShardError: it failed on another rank; or the scorer is closed, now or before.
        """
        number = self.models.index(model)
        assert batch.host is not None
        rows, width = batch.table.shape
        chosen = None if read is None else read.cpu().numpy()
        order = Forward(batch.host, batch.segments, chosen, (rows, width), self._writes[number])
        with self.calling():
            self.ranks.send(encoded(number, order))
            self._writes[number] = []
            return self.in_step(number, lambda: (batch, read))

    def follow(self, model: PackedModel) -> None:
        """All ranks read the weights of a model in memory anew.

        Raises ShardError: they changed on this rank and not on another.
        """
        number = self.models.index(model)
        with self.calling():
            self.ranks.send(np.array([Order.FOLLOW, number], np.int64))
            self.settle(None)

    def close(self) -> None:
        """Ends the followers, whose `follow` then returns; there are no more calls."""
        with self.lock:
            if self.closed is not None:
                return
            if self.leads:
                with contextlib.suppress(ShardError):
                    self.ranks.send(_END)
            self.close_here("close() was called")

    def close_here(self, reason: str) -> None:
        """The end on this rank; what the others wait for comes no more."""
        self.closed = reason
        _OPEN.discard(self)
        if self._forgotten is not None:
            self._forgotten.detach()
        self.ranks.leave()

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """One call; one that is left in the middle leaves the ranks out of step for good."""
        with self.lock:
            self._check_open()
            self._settled = False
            try:
                yield
            except BaseException as error:
                if not self._settled and self.closed is None:
                    said = str(error) if isinstance(error, ShardError) else type(error).__name__
                    self.close_here(f"a call was left in the middle: {said}")
                raise

    def _check_open(self) -> None:
        if self.closed is not None:
            raise ShardError(
                f"the sharded scorer is closed ({self.closed}): call load_scorer on all ranks"
            )

    # What all ranks do.

    def in_step(
        self, number: int, prepare: Callable[[], tuple[PackedBatch, Tensor | None]]
    ) -> Tensor:
        """One forward of a model, which all ranks begin and end together, from `calling`."""
        model, collectives = self.models[number], self._collectives[number]
        prepared: list[tuple[PackedBatch, Tensor | None]] = []
        error = failure_of(lambda: prepared.append(prepare()))
        self.settle(error, last=False)
        ((batch, read),) = prepared
        outputs: list[Tensor] = []
        since, patience = collectives.passed, CALLING
        error = failure_of(lambda: outputs.append(model.run(batch, read)))
        if error is not None:
            catch_up = partial(
                collectives.catch_up, since, len(batch.token_ids), read, model.device
            )
            later = failure_of(catch_up)
            if later is not None or collectives.sums is None:
                patience = FAILED
        self.settle(error, passed=collectives.passed, patience=patience)
        return outputs[0]

    def settle(
        self,
        error: BaseException | None,
        *,
        passed: int = 0,
        patience: timedelta = CALLING,
        last: bool = True,
    ) -> None:
        """Hears the others; last: nothing of the call comes after it.

        Raises this rank's own error; or ShardError, where others failed.
        """
        try:
            verdict = self.ranks.vote(error, passed, patience)
        except ShardError as gone:
            self.close_here(str(gone))
            raise gone from error
        if not verdict.in_step:
            said = failed_elsewhere(verdict.failures)
            self.close_here(str(said))
            raise ShardError(
                f"{said}; the ranks are out of step after it, and the scorer is closed: end its "
                "processes and load it again"
            ) from error
        self._settled = last or bool(verdict.failures)
        if error is not None:
            raise error
        if verdict.failures:
            raise failed_elsewhere(verdict.failures)


def failure_of(work: Callable[[], object]) -> BaseException | None:
    """What a piece of work raises, without the tensors that it had."""
    try:
        work()
    except BaseException as error:
        clear_frames(error.__traceback__)
        return error
    return None


def close_all() -> None:
    """Ends the followers of every scorer that this rank leads."""
    for shards in list(_OPEN):
        if shards.leads:
            shards.close()


atexit.register(close_all)


def _tell_the_end(ranks: Ranks) -> None:
    """What a leader says that nobody refers to any more."""
    with contextlib.suppress(Exception):
        ranks.send(_END)
    ranks.leave()
