"""HTTP servers that answer the same requests: they share the load; what fails is tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from guided_decode.cache.closable import Closable
from guided_decode.search.event_loop import EventLoopThread
from guided_decode.search.http_access import check_urls
from guided_decode.search.http_failures import (
    EndpointError,
    Failure,
    RequestRefused,
    Retry,
    check_status,
)
from guided_decode.search.http_turns import Server, Tries, Turns

T = TypeVar("T")
Body = Mapping[str, Any]
# What makes an answer of one: the JSON that came, and the body that it answers. ValueError: it is
# not what was asked for, and is asked for again. RequestRefused: it never will be, and is raised.
Read = Callable[[Any, Body], T]

_CONNECT_SECONDS = 10.0
# Servers drop connections that idle for 5 seconds, maybe as they are used again.
_KEEP_ALIVE_SECONDS = 2.0
_USUAL = Retry()


def as_object(answer: Any, body: Body) -> dict[str, Any]:
    """The answer itself. Raises ValueError: it is no JSON object."""
    if not isinstance(answer, dict):
        raise ValueError(f"{json.dumps(answer)[:80]} came where an object was expected")
    return answer


class Endpoints(Closable):
    """Servers that answer the same; a request goes to the one with the least under way.

    What fails (no connection, a time limit, 408, 409, 425, 429, most of 5xx, an answer that is not
    what was asked for) is tried again, at another server at once where there is one, and after
    waits that grow. A server that is busy or gone is left alone for a while. Threads may share it.
    """

    def __init__(
        self,
        urls: str | Iterable[str],
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        concurrency: int = 32,
        retry: Retry = _USUAL,
    ) -> None:
        """
        Args:
            urls: one or several, as `http_access.check_urls` takes them.
            api_key: sent as a bearer token; see `http_access.api_key_of`.
            timeout: seconds from an attempt's first byte to its answer's last.
            concurrency: the most requests that one server has at a time.
            retry: how often, and after which waits.

        Raises ValueError: no URL, one that is none, one twice; a limit that is not above 0.
        """
        if not timeout > 0.0:
            raise ValueError(f"timeout={timeout}: expected seconds above 0")
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: expected an integer of at least 1")
        self.timeout, self.concurrency, self.retry = timeout, concurrency, retry
        self._servers = [Server(url) for url in check_urls(urls)]
        self._turns = Turns(concurrency, retry)
        self._api_key = api_key
        self._headers = {"content-type": "application/json", "accept": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._threads = EventLoopThread("guided-decode-http")
        self._client: httpx.AsyncClient | None = None
        self._retries = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.urls)})"

    @property
    def urls(self) -> tuple[str, ...]:
        """Where its servers are."""
        return tuple(server.url for server in self._servers)

    @property
    def attempts(self) -> dict[str, int]:
        """Requests that were sent so far, those that failed among them, by URL."""
        return {server.url: server.attempts for server in self._servers}

    @property
    def retries(self) -> int:
        """How often a request was sent again so far, at whatever server."""
        return self._retries

    def post(self, path: str, body: Body, read: Read[Any] = as_object) -> Any:
        """One answer; as `post_all`."""
        return self.post_all(path, [body], read)[0]

    def post_all(
        self,
        path: str,
        bodies: Sequence[Body],
        read: Read[Any] = as_object,
    ) -> list[Any]:
        """Answers of all requests, in their order, of as many at a time as the servers may have.

        Args:
            path: after a server's URL.
            bodies: JSON objects.
            read: what makes an answer of the JSON that came, by it and the body; where it raises
                ValueError, the request is tried again, and where it raises RequestRefused, not.

        Raises:
            EndpointError: all servers failed a request as often as it may be tried, or one is not
                what it should be. RequestRefused, a ValueError: a request will never be answered,
                by a server's word or by that of `read`.
            The others that are under way are given up then.
        """
        calls = [_Call("POST", path, body, read) for body in bodies]
        return self._threads.run(self._all(calls))

    def post_to_each(self, path: str, body: Body, read: Read[Any] = as_object) -> list[Any]:
        """The answer of each server to the same request, in the order of `urls`; as `post_all`."""
        return self._threads.run(self._each(_Call("POST", path, body, read)))

    def get_from_each(self, path: str, read: Read[Any] = as_object) -> list[Any]:
        """What each server has at a path, in the order of `urls`; as `post_all`."""
        return self._threads.run(self._each(_Call("GET", path, {}, read)))

    def close(self) -> None:
        """Ends its thread and connections; it answers no more."""
        if self._client is not None:
            client, self._client = self._client, None
            self._threads.run(client.aclose())
        self._threads.close()

    async def _all(self, calls: Sequence[_Call[T]]) -> list[T]:
        answers: dict[int, T] = {}
        left = iter(enumerate(calls))

        async def work() -> None:
            for i, call in left:
                answers[i] = await self._answered(call, self._servers)

        most = self.concurrency * len(self._servers)
        await _together([work() for _ in range(min(most, len(calls)))])
        return [answers[i] for i in range(len(calls))]

    async def _each(self, call: _Call[T]) -> list[T]:
        answers: dict[str, T] = {}

        async def ask(server: Server) -> None:
            answers[server.url] = await self._answered(call, [server])

        await _together([ask(server) for server in self._servers])
        return [answers[url] for url in self.urls]

    async def _answered(self, call: _Call[T], servers: Sequence[Server]) -> T:
        tries = {server.url: Tries(server) for server in servers}
        while True:
            own = await self._turns.take(list(tries.values()))
            try:
                return await self._attempt(own.server, call)
            except Failure as failure:
                own.failed(failure, self.retry)
            finally:
                self._turns.release(own.server)
            if not self._turns.left(tries.values()):
                raise EndpointError(_gave_up(call, list(tries.values())))
            self._retries += 1

    async def _attempt(self, server: Server, call: _Call[T]) -> T:
        if self._client is None:
            self._client = _new_client(self.timeout)
        where = server.url + call.path
        try:
            async with asyncio.timeout(self.timeout):
                response = await self._client.request(
                    call.method, where, content=call.content, headers=self._headers
                )
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Failure(f"gave no answer within {self.timeout:g} s", busy=True) from error
        except httpx.RequestError as error:
            said = " ".join(str(error).split())
            reason = f"{type(error).__name__}{': ' if said else ''}{said}"
            what = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke off"
            raise Failure(f"{what} ({reason})", busy=True) from error
        check_status(response, where, self._api_key)
        try:
            answer = call.read(response.json(), call.body)
        except RequestRefused:
            raise
        # JSON of other types than were expected, at any depth.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            said = " ".join(str(error).split())[:200]
            raise Failure(f"answered what was not asked for ({said})") from error
        server.failures = 0
        return answer


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    method: str
    path: str
    body: Body
    read: Read[T]

    @property
    def content(self) -> bytes | None:
        return None if self.method == "GET" else json.dumps(self.body).encode()


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs coroutines side by side; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _new_client(timeout: float) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        # The whole attempt has a limit of its own.
        timeout=httpx.Timeout(None, connect=min(_CONNECT_SECONDS, timeout)),
        limits=httpx.Limits(
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=_KEEP_ALIVE_SECONDS,
        ),
    )


def _gave_up(call: _Call[Any], tries: Sequence[Tries]) -> str:
    last = "; ".join(
        f"{each.server.url}{call.path} {each.reasons[-1]}, the last of {each.count} attempts"
        for each in tries
    )
    return f"{last}: expected an answer; see that the server is up and not overloaded, or give it "\
           "more time"  # fmt: skip
