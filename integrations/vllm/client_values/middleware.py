"""ASGI middleware: responses to requests with `guide_values` carry their tokens' values.

    vllm serve POLICY --middleware guided_decode.integrations.vllm.client_values.middleware.\\
ValuesToClient

A request that asks gets a name that nobody can guess, under which its rows' values wait in the
worker, and is answered with token ids, by which they are found there. All other requests and
responses pass as they are; of their bodies only the bytes are looked through.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.names import NAMES
from guided_decode.integrations.vllm.client_values.replies import JsonReply, StreamedReply, reply_to
from guided_decode.integrations.vllm.client_values.requests import Asked, asked_of
from guided_decode.integrations.vllm.client_values.responses import ResponseValues
from guided_decode.integrations.vllm.client_values.worker import METHOD, refuse_unreadable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# vLLM's own two that take vllm_xargs and have choices: chat and completions.
_PATHS = ("/v1/chat/completions", "/v1/completions")


class ValuesToClient:
    """Puts `guided_decode` into each choice of a response whose request has `guide_values`."""

    def __init__(self, app: App) -> None:
        """app: what is behind it; its state has vLLM's engine client."""
        self._app = app
        self._collector: ValueCollector | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one connection; HTTPException comes up where its body is read."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        with NAMES.serving():
            if not is_post or not scope["path"].endswith(_PATHS):
                await self._app(scope, receive, send)
                return
            exchange = _Exchange(self, scope, receive, send)
            try:
                await self._app(scope, exchange.receive, exchange.send)
            finally:
                exchange.close()

    def collector(self, scope: Message) -> ValueCollector:
        """What asks the worker for this server's responses.

        Raises ValueError: this engine's workers cannot be asked.
        """
        state = scope["app"].state
        refuse_unreadable(state.vllm_config.parallel_config)
        if self._collector is None:
            client = state.engine_client

            async def ask(names: list[str]) -> Any:
                return await client.collective_rpc(METHOD, args=(names,))

            self._collector = ValueCollector(ask)
        return self._collector


class _Exchange:
    """One request and its response."""

    def __init__(
        self, middleware: ValuesToClient, scope: Message, receive: Receive, send: Send
    ) -> None:
        self._middleware, self._scope = middleware, scope
        self._receive, self._send = receive, send
        self._is_read = False
        self._name: str | None = None
        self._collector: ValueCollector | None = None
        self._values: ResponseValues | None = None
        self._reply: StreamedReply | JsonReply | None = None

    async def receive(self) -> Message:
        """The whole body in one message, since what is asked may stand at its end."""
        if self._is_read:
            return await self._receive()
        pieces: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        self._is_read = True
        return {"type": "http.request", "body": self._asked(b"".join(pieces)), "more_body": False}

    def _asked(self, body: bytes) -> bytes:
        """The body as it goes on."""
        try:
            asked = asked_of(body)
            if asked is None:
                return body
            return asked.body(self._open(asked))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    def _open(self, asked: Asked) -> str:
        """The request's name."""
        self._collector = self._middleware.collector(self._scope)
        self._name = name = NAMES.draw()
        self._collector.open(name)
        self._values = ResponseValues(
            name, self._collector, keep_ids=asked.keeps_ids, choices=asked.choices
        )
        return name

    async def send(self, message: Message) -> None:
        """The response as it goes on, with values where its request asked for them."""
        if message["type"] == "http.response.start" and self._values is not None:
            assert self._collector is not None
            self._reply = reply_to(message, self._values, self._collector, self._send)
        await (self._send if self._reply is None else self._reply.send)(message)

    def close(self) -> None:
        """The response is over, however it ended."""
        if self._collector is not None and self._name is not None:
            self._collector.close(self._name)
            NAMES.drop(self._name)
