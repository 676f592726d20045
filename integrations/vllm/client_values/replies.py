"""A response on its way to the client: rewritten whole, or event by event."""

import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.responses import ResponseValues

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_DATA = b"data: "
_END = b"\n\n"
_ENCODING, _LENGTH = b"content-encoding", b"content-length"
# zlib's for gzip.
_GZIP = 31


def reply_to(
    start: Message, values: ResponseValues, collector: ValueCollector, send: Send
) -> "JsonReply | StreamedReply | None":
    """What rewrites a response that begins so; None where it goes on as it comes.

    start: its first message.
    """
    headers = dict(start.get("headers", ()))
    kind, encoding = headers.get(b"content-type", b""), headers.get(_ENCODING, b"identity")
    if start["status"] != 200:
        return None
    if encoding not in (b"identity", b"gzip"):
        collector.warn("a middleware behind ours compresses them, and not by gzip", encoding)
        return None
    if kind.startswith(b"text/event-stream"):
        return StreamedReply(values, collector, send)
    return JsonReply(values, send) if kind.startswith(b"application/json") else None


class _Plain:
    """The pieces of a body without the compression of a middleware behind ours."""

    def __init__(self, start: Message) -> None:
        coded = any(name == _ENCODING and value != b"identity" for name, value in start["headers"])
        self._decoder = zlib.decompressobj(_GZIP) if coded else None

    def __call__(self, message: Message) -> bytes:
        body: bytes = message.get("body", b"")
        if self._decoder is None:
            return body
        body = self._decoder.decompress(body)
        return body if message.get("more_body", False) else body + self._decoder.flush()


def _with_headers(start: Message, *more: tuple[bytes, bytes]) -> Message:
    """The start of a response whose body is another one now, and not compressed."""
    others = [each for each in start["headers"] if each[0] not in (_ENCODING, _LENGTH)]
    return {**start, "headers": [*others, *more]}


class JsonReply:
    """A response of one JSON object: held until it is whole, since its length changes."""

    def __init__(self, values: ResponseValues, send: Send) -> None:
        self._values, self._send = values, send
        self._start: Message = {}
        self._pieces: list[bytes] = []

    async def send(self, message: Message) -> None:
        """The next message of the response."""
        if message["type"] == "http.response.start":
            self._start, self._plain = message, _Plain(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._pieces.append(self._plain(message))
        if message.get("more_body", False):
            return
        body = await _with_values(self._values, b"".join(self._pieces))
        await self._send(_with_headers(self._start, (_LENGTH, str(len(body)).encode())))
        await self._send({"type": "http.response.body", "body": body})


class StreamedReply:
    """Server-sent events: each goes on as soon as it is whole."""

    def __init__(self, values: ResponseValues, collector: ValueCollector, send: Send) -> None:
        self._values, self._collector, self._send = values, collector, send
        self._rest = b""

    async def send(self, message: Message) -> None:
        """The next message of the response."""
        if message["type"] == "http.response.start":
            self._plain = _Plain(message)
            await self._send(_with_headers(message))
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = message.get("more_body", False)
        *events, self._rest = (self._rest + self._plain(message)).split(_END)
        body = b"".join([await self._event(event) + _END for event in events])
        if not more:
            body, self._rest = body + self._rest, b""
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        if more and events:
            self._collector.ahead()

    async def _event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA + b"{"):
            return event
        return _DATA + await _with_values(self._values, event[len(_DATA) :])


async def _with_values(values: ResponseValues, data: bytes) -> bytes:
    """A JSON object with values; what is none goes on as it came."""
    try:
        answer = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        return data
    await values.add(answer)
    return msgspec.json.encode(answer)
