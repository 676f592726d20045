"""Which of several HTTP servers a request goes to, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from guided_decode.search.http_failures import Failure, Retry


@dataclass(slots=True)
class Server:
    """failures: one after another, of those that say that it is busy or gone. wakes: on the loop's
    clock, when it may be asked again."""

    url: str
    under_way: int = 0
    attempts: int = 0
    failures: int = 0
    wakes: float = 0.0


@dataclass(slots=True)
class Tries:
    """What one request has tried at a server. rests: until when the request waits with it."""

    server: Server
    count: int = 0
    rests: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def wakes(self) -> float:
        return max(self.rests, self.server.wakes)

    def failed(self, failure: Failure, retry: Retry) -> None:
        now = asyncio.get_running_loop().time()
        self.count += 1
        self.reasons.append(failure.reason)
        self.rests = now + retry.wait(self.count, failure.after)
        # What was sent before it fell silent fails with it, and says nothing new.
        if failure.busy and self.server.wakes <= now:
            self.server.failures += 1
            self.server.wakes = now + retry.wait(self.server.failures, failure.after)


class Turns:
    """Hands out places at servers: the least busy first, none at one that is left alone."""

    def __init__(self, concurrency: int, retry: Retry) -> None:
        self._concurrency, self._retry = concurrency, retry
        self._waiting: set[asyncio.Future[None]] = set()

    def left(self, tries: Iterable[Tries]) -> list[Tries]:
        """Those that may be tried again."""
        return [each for each in tries if each.count < self._retry.attempts]

    async def take(self, tries: Sequence[Tries]) -> Tries:
        """Waits until a server may be asked, and takes a place there."""
        clock = asyncio.get_running_loop().time
        left = self.left(tries)
        while True:
            now = clock()
            free = [each for each in left if each.server.under_way < self._concurrency]
            awake = [each for each in free if each.wakes <= now]
            if awake:
                chosen = min(awake, key=lambda each: (each.server.under_way, each.server.attempts))
                chosen.server.under_way += 1
                chosen.server.attempts += 1
                return chosen
            soonest = min((each.wakes - now for each in free), default=None)
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await asyncio.wait([waiter], timeout=soonest)
            finally:
                self._waiting.discard(waiter)

    def release(self, server: Server) -> None:
        """Gives the place back, to whoever waits."""
        server.under_way -= 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
