"""The front end's side: fetches what the worker keeps, for all responses that are under way."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from guided_decode.integrations.vllm.client_values.records import Known, decoded
from guided_decode.integrations.vllm.client_values.turns import turns

logger = logging.getLogger("guided_decode")

# Given names of requests, the answer of each rank.
Ask = Callable[[list[str]], Awaitable[Sequence[bytes]]]

_NO_ANSWER = "the worker did not answer"
# Seconds in which an engine that lives answers, also behind a long prefill.
_PATIENCE = 30.0
# Seconds after which the worker is relieved of what nobody waits for yet.
_EVERY = 0.5


class ValueCollector:
    """Asks the worker, once for all who wait: one call is under way at a time.

    A token reaches the front end after the worker kept what it knew of it, so that whatever a call
    does not bring that began after the token came is not to be had.
    """

    def __init__(self, ask: Ask, *, patience: float = _PATIENCE, every: float = _EVERY) -> None:
        """
        Args:
            ask: the call.
            patience: seconds that responses wait for one; what they lack then they go without, as
                do all others until a call is answered again.
            every: seconds between calls for responses that wait for nothing yet.
        """
        self._ask = ask
        self._patience = patience
        self._every = every
        self._open: dict[str, Known] = {}
        self._call: asyncio.Task[None] | None = None
        self._relief: asyncio.Task[None] | None = None
        self._said: set[str] = set()
        # All that were not answered yet; asyncio itself would forget them.
        self._answers: set[asyncio.Task[None]] = set()
        self._is_late = False
        self.calls = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, name: str) -> None:
        """A response begins, for a request of this name."""
        self._open[name] = Known()
        if self._relief is None or self._relief.done():
            self._relief = asyncio.create_task(self._relieve())

    def close(self, name: str) -> None:
        """It is over, or its client has left: nothing is kept of it."""
        self._open.pop(name, None)

    async def known(self, name: str, texts: Sequence[bytes], tokens: Sequence[int]) -> Known:
        """What there is of these tokens of an open response, each behind its text."""
        known = self._open[name]
        # One that is under way may have begun before the tokens came; the next one did not.
        for _ in range(2 if self._is_under_way else 1):
            if self._is_late or not await _lacks(known, texts, tokens):
                break
            await asyncio.wait({self.ahead()})
        return known

    @property
    def _is_under_way(self) -> bool:
        return self._call is not None and not self._call.done()

    def ahead(self) -> asyncio.Task[None]:
        """The call that is under way; begins one where there is none.

        An engine answers between two steps: begun now, it is answered with the next token.
        """
        if self._call is None or self._call.done():
            self._call = asyncio.create_task(self._fetch())
        return self._call

    async def _fetch(self) -> None:
        """A call, for so long as anyone waits for it; what it brings later is kept as well."""
        self.calls += 1
        answer = asyncio.create_task(self._answer())
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        _, late = await asyncio.wait({answer}, timeout=self._patience)
        if late:
            self._is_late = True
            self.warn(_NO_ANSWER, f"nothing came within {self._patience:g} seconds")

    def warn(self, reason: str, detail: object) -> None:
        """Says why responses go without values; of one reason once."""
        if reason not in self._said:
            logger.warning("responses go without values: %s: %s", reason, detail)
        self._said.add(reason)

    async def _answer(self) -> None:
        try:
            answers = await self._ask(list(self._open))
        except Exception as error:
            self.warn(_NO_ANSWER, error)
            return
        self._is_late = False
        self._said.discard(_NO_ANSWER)
        for data in answers:
            for name, records in decoded(data).items():
                known = self._open.get(name, Known())
                async for i in turns(len(records)):
                    known.add(records[i])

    async def _relieve(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            if not self._open:
                return
            await self.ahead()


async def _lacks(known: Known, texts: Sequence[bytes], tokens: Sequence[int]) -> bool:
    return any([known.lacks(texts[i], tokens[i]) async for i in turns(len(texts))])
