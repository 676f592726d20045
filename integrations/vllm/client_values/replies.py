"""A response on its way to the client: rewritten whole, or event by event."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.responses import ResponseValues

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_DATA = b"data: "
_END = b"\n\n"


def _dumped(answer: object) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


class JsonReply:
    """A response of one JSON object: held until it is whole, since its length changes."""

    def __init__(self, values: ResponseValues, send: Send) -> None:
        self._values, self._send = values, send
        self._start: Message = {}
        self._pieces: list[bytes] = []

    async def send(self, message: Message) -> None:
        """The next message of the response."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._pieces.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        answer = json.loads(b"".join(self._pieces))
        await self._values.add(answer)
        body = _dumped(answer)
        others = [each for each in self._start["headers"] if each[0] != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self._send({**self._start, "headers": [*others, length]})
        await self._send({"type": "http.response.body", "body": body})


class StreamedReply:
    """Server-sent events: each goes on as soon as it is whole."""

    def __init__(self, values: ResponseValues, collector: ValueCollector, send: Send) -> None:
        self._values, self._collector, self._send = values, collector, send
        self._rest = b""

    async def send(self, message: Message) -> None:
        """The next message of the response."""
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = message.get("more_body", False)
        *events, self._rest = (self._rest + message.get("body", b"")).split(_END)
        body = b"".join([await self._with_values(event) + _END for event in events])
        if not more:
            body, self._rest = body + self._rest, b""
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        if more and events:
            self._collector.ahead()

    async def _with_values(self, event: bytes) -> bytes:
        if not event.startswith(_DATA + b"{"):
            return event
        chunk = json.loads(event[len(_DATA) :])
        await self._values.add(chunk)
        return _DATA + _dumped(chunk)
