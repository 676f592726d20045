"""The processes that share one sharded model: what one says to the others, and how they agree.

Beside the model's own collectives, which transformers makes, they have one group of gloo's on
their hosts. Its waits end at once where a process dies, whose sockets the system closes.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from guided_decode.growable import Ints

logger = logging.getLogger("guided_decode")

# A follower waits for orders as long as its leader lives; longer times overflow in gloo.
_IDLE = timedelta(days=30)
# How long a rank that is well waits for the others: weights come from disks of unlike speed, and
# the longest forward of a large model on a CPU takes minutes.
LOADING = timedelta(hours=2)
CALLING = timedelta(minutes=30)
# How long one that failed waits for others, which may wait for it elsewhere.
FAILED = timedelta(seconds=10)
# Numbers of an order that go out at once; a longer one takes a second broadcast.
_INLINE = 2048


class ShardError(RuntimeError):
    """A call that ended on all ranks because of one, or a sharded scorer that is closed."""


class Verdict(NamedTuple):
    """What the ranks said together.

    failures: by rank, why it failed. in_step: all passed the same number of collectives.
    """

    failures: dict[int, str]
    in_step: bool


class Ranks:
    """All processes of the default group; rank 0 leads."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_IDLE)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def send(self, order: Ints) -> None:
        """Tells the others an order, int64 [n]. Raises ShardError: one of them is gone."""
        first = np.zeros(_INLINE, np.int64)
        first[0], rest = len(order), order[_INLINE - 1 :]
        first[1 : 1 + len(order)] = order[: _INLINE - 1]
        self._broadcast(torch.from_numpy(first))
        if len(rest):
            self._broadcast(torch.from_numpy(rest.copy()))

    def receive(self) -> Ints:
        """The leader's next order, however long it takes. Raises ShardError: the leader is gone."""
        first = torch.zeros(_INLINE, dtype=torch.int64)
        self._broadcast(first)
        length = int(first[0])
        order: Ints = first[1 : 1 + length].numpy()
        if length < _INLINE:
            return order
        rest = torch.empty(length - len(order), dtype=torch.int64)
        self._broadcast(rest)
        return np.concatenate([order, rest.numpy()])

    def vote(
        self, error: BaseException | None, passed: int = 0, patience: timedelta = CALLING
    ) -> Verdict:
        """What went wrong on which rank; all ranks ask together.

        Args:
            error: what went wrong here, or None.
            passed: collectives of the model that this rank has passed.
            patience: how long to wait for the others.

        Raises ShardError: a rank is gone, or does not answer.
        """
        ballot = torch.tensor([error is not None, passed, -passed], dtype=torch.int64)
        with _in_words("a rank is gone, or did not answer in time"):
            dist.all_reduce(
                ballot, dist.ReduceOp.MAX, group=self._group, async_op=True
            ).wait(patience)  # fmt: skip
            failed, most, least = ballot.tolist()
            said = self.gather(_said(error)) if failed else []
        failures = {rank: text for rank, text in enumerate(said) if text}
        return Verdict(failures, most == -least)

    def gather(self, said: Any) -> list[Any]:
        """What each rank says, by rank: a few picklable words."""
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, said, group=self._group)
        return every

    def leave(self) -> None:
        """Gives the group up; another's wait for this rank then ends with its process."""
        group, self._group = self._group, None
        # At the end of a process torch may have destroyed it.
        with contextlib.suppress(Exception):
            dist.destroy_process_group(group)

    def _broadcast(self, numbers: torch.Tensor) -> None:
        gone = "rank 0, the leader, is gone" if self.rank else "a rank is gone"
        with _in_words(gone):
            dist.broadcast(numbers, 0, group=self._group)


def failed_elsewhere(failures: dict[int, str]) -> ShardError:
    """The error of a rank that is well where others failed."""
    said = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
    return ShardError(f"the call ended on all ranks because it failed on {said}")


def same_everywhere(ranks: Ranks, what: Sequence[tuple[str, object]]) -> None:
    """Raises ShardError: the ranks differ in a thing that must be the same, by its name."""
    every = ranks.gather([str(value) for _, value in what])
    for at, (name, _) in enumerate(what):
        values = [said[at] for said in every]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ShardError(
                f"the ranks were given different models: {name} is {shown}; pass the same "
                "checkpoint and options on every rank"
            )


def _said(error: BaseException | None) -> str:
    if error is None:
        return ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Gloo's errors, which speak of sockets, as a ShardError that says what happened."""
    try:
        yield
    except RuntimeError as error:
        raise ShardError(what) from error
