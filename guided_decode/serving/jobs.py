"""Requests that wait to be scored, and the fair order in which they are."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guided_decode.serving.sessions import HeldPrefix


@dataclass(slots=True, eq=False)
class Job:
    """A request for scores.

    peer: where its answer goes. client, number: whose it is. target: the model's name.
    candidates: int32 [rows, k]. costs: one a row, and its new tokens and candidates.
    values, baseline: float32, filled as rows are scored. taken: rows that were handed out to
    rounds; left: rows that are not scored yet.
    """

    peer: bytes
    client: bytes
    number: int
    target: str
    prefixes: list[HeldPrefix]
    candidates: NDArray[np.int32]
    costs: list[int]
    values: NDArray[np.float32] = field(init=False)
    baseline: NDArray[np.float32] = field(init=False)
    taken: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.empty(self.candidates.shape, np.float32)
        self.baseline = np.empty(len(self.prefixes), np.float32)
        self.left = len(self.prefixes)

    @property
    def cost(self) -> int:
        return sum(self.costs)


class Slice(NamedTuple):
    """Rows start to stop of a job."""

    job: Job
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == len(self.job.prefixes)


class FairQueue:
    """Jobs by client; a round takes from each in turn, and no more of one than its share.

    tokens: what waits in all, new tokens and candidates.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[bytes, deque[Job]] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._clients.values())

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, job: Job) -> None:
        """A job, behind those of its client."""
        self._clients.setdefault(job.client, deque()).append(job)
        self.tokens += job.cost

    def drop(self, job: Job) -> None:
        """Takes the rest of a job out: it has been answered otherwise."""
        jobs = self._clients.get(job.client)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            self.tokens -= sum(job.costs[job.taken :])
            if not jobs:
                del self._clients[job.client]

    def drain(self) -> list[Job]:
        """All jobs, those of which rows were taken among them; nothing waits any longer."""
        jobs = [job for own in self._clients.values() for job in own]
        self._clients.clear()
        self.tokens = 0
        return jobs

    def take(self, tokens: int) -> list[Slice]:
        """Rows for one round: about so many tokens, shared evenly by the clients that wait."""
        share = max(1, tokens // max(1, len(self._clients)))
        taken = [each for client in list(self._clients) for each in self._take(client, share)]
        # Who came first this time comes last the next.
        if self._clients:
            self._clients.move_to_end(next(iter(self._clients)))
        return taken

    def _take(self, client: bytes, share: int) -> Iterator[Slice]:
        jobs = self._clients[client]
        left = share
        # A row that is larger than the share has a round of its client's own.
        while jobs and left > 0:
            job, start = jobs[0], jobs[0].taken
            while job.taken < len(job.costs) and (left == share or job.costs[job.taken] <= left):
                left -= job.costs[job.taken]
                self.tokens -= job.costs[job.taken]
                job.taken += 1
                if left <= 0:
                    break
            if job.taken > start or not job.costs:
                yield Slice(job, start, job.taken)
            if job.taken < len(job.costs):
                break
            jobs.popleft()
        if not jobs:
            del self._clients[client]
