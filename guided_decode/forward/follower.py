"""What `load_scorer` gives the ranks that do not lead a sharded scorer."""

import logging
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from guided_decode.cache.closable import Closable
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import PackedBatch, batch_of
from guided_decode.forward.ranks import ShardError
from guided_decode.forward.shard_orders import Order, decoded
from guided_decode.forward.shards import Shards, failure_of
from guided_decode.growable import Ints

logger = logging.getLogger("guided_decode")


class Follower(Closable):
    """A shard of a scorer, which works for the leader's scorer on rank 0 and scores nothing itself.

    As a context manager it gives its shard up at the end of the block.
    """

    is_leader = False

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    @without_autograd
    def follow(self) -> None:
        """Runs the leader's forwards on this rank's shard until the leader closes its scorer.

        An exception of one forward ends that call on all ranks, and is logged here.

        Raises ShardError: the leader is gone, or the ranks are out of step; end the process.
        """
        while self._shards.closed is None:
            try:
                order = self._shards.ranks.receive()
            except ShardError:
                self._shards.close_here("the leader is gone")
                raise
            self._serve(order)

    def _serve(self, order: Ints) -> None:
        """This rank's part in one order. Raises ShardError: it is out of step with the others."""
        shards, kind, number = self._shards, Order(int(order[0])), int(order[1])
        if kind is Order.END:
            shards.close_here("the leader closed it")
            return
        try:
            with shards.calling():
                if kind is Order.FORWARD:
                    shards.in_step(number, partial(self._batch, number, order))
                else:
                    shards.settle(failure_of(partial(self._read_anew, number)))
        except Exception as error:
            if shards.closed is not None:
                raise
            logger.error("rank %d: %s", shards.ranks.rank, error)

    def _batch(self, number: int, order: Ints) -> tuple[PackedBatch, Tensor | None]:
        """The batch of an order, on this rank's tables and pool."""
        model, forward = self._shards.models[number], decoded(order)
        tables = model.cache.tables
        tables.reshape(*forward.table)
        for write in forward.writes:
            tables.write(write)
        if model.changed():
            raise ValueError(
                f"the weights of {model.name} changed here and not on rank 0: change them on every "
                "rank, between calls"
            )
        batch = batch_of(
            forward.tokens, forward.segments, tables.table, model.cache.pool, fused=model.fused
        )
        read = None if forward.read is None else torch.from_numpy(forward.read.copy())
        return batch, None if read is None else read.to(model.device)

    def _read_anew(self, number: int) -> None:
        model = self._shards.models[number]
        if not model.changed():
            raise ValueError(
                f"the weights of {model.name} changed on rank 0 and not here: change them on every "
                "rank, between calls"
            )
        model.follow()

    def close(self) -> None:
        """Gives the shard up. A leader that goes on finds this rank gone."""
        self._shards.close()

    def __repr__(self) -> str:
        ranks = self._shards.ranks
        return f"Follower(rank {ranks.rank} of {ranks.world})"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        ranks: Any = self._shards.ranks
        raise AttributeError(
            f"rank {ranks.rank} of {ranks.world} has no {name!r}: it follows the scorer of rank 0, "
            "which alone scores; call follow() where is_leader is False"
        )
