"""vLLM's beam search drops `vllm_xargs`: a request that asks for both is refused, not served plain.

    vllm serve POLICY --middleware guided_decode.integrations.vllm.beam_refusal.RefuseGuidedBeams

vLLM makes other parameters of a request with `use_beam_search`, before any logits processor sees
it; beams are ranked by the policy's own log-probabilities.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException
from pydantic import TypeAdapter, ValidationError

from guided_decode.integrations.vllm.request_keys import is_own_key
from guided_decode.integrations.vllm.server_config import front_end_config, shown

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_App = Callable[[_Message, _Receive, Callable[[_Message], Awaitable[None]]], Awaitable[None]]

_FIELD = b"use_beam_search"
# 1, "true", "yes".
_TRUE = TypeAdapter(bool)


class RefuseGuidedBeams:
    """ASGI middleware: HTTP 400 for a request that wants beams and guidance.

    Bodies are looked at as the application reads them, so who may not ask is told that first, and
    none is held that the application does not hold as well; parsed are those that name the field.
    """

    def __init__(self, app: _App) -> None:
        """app: what is behind it."""
        self._app = app
        config = front_end_config()
        self._by_default = config is not None and config.guide_by_default

    async def __call__(
        self, scope: _Message, receive: _Receive, send: Callable[[_Message], Awaitable[None]]
    ) -> None:
        """Serves one connection; HTTPException comes up where its body is read."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = _Body()

        async def read() -> _Message:
            message = await receive()
            if message["type"] == "http.request" and body.ends_with(message):
                self._check(body)
            return message

        await self._app(scope, read, send)

    def _check(self, body: "_Body") -> None:
        reason = refusal_of(body.parsed(), by_default=self._by_default) if body.is_named else None
        body.forget()
        if reason is not None:
            raise HTTPException(400, reason)


class _Body:
    """A request's body as it comes; its pieces are the application's own."""

    def __init__(self) -> None:
        self.is_named = False
        self._pieces: list[bytes] = []
        self._end = b""

    def ends_with(self, message: _Message) -> bool:
        """Takes the next piece; whether it is the last one."""
        piece = message.get("body", b"")
        # The name may be cut in two.
        self.is_named = self.is_named or _FIELD in piece or _FIELD in self._end + piece[:32]
        self._end = (self._end + piece[-32:])[-32:]
        self._pieces.append(piece)
        return not message.get("more_body", False)

    def parsed(self) -> object:
        """The JSON; None where it is none, which is for the application to say."""
        try:
            return json.loads(b"".join(self._pieces))
        except (ValueError, RecursionError):
            return None

    def forget(self) -> None:
        self._pieces.clear()


def refusal_of(request: object, *, by_default: bool) -> str | None:
    """Why a request is not served: it asks for beams and, by a key or by default, for guidance."""
    if not isinstance(request, dict) or not is_true(request.get("use_beam_search")):
        return None
    given = request.get("vllm_xargs")
    own = {k: v for k, v in given.items() if is_own_key(k)} if isinstance(given, dict) else {}
    if own.get("guide") in (0, "0") and len(own) == 1:
        return None
    if own:
        return (
            f"use_beam_search was given together with {shown(next(iter(own)))}, but vLLM's beam "
            "search drops vllm_xargs: its beams cannot be guided; drop one of them (the search of "
            'Hugging Face\'s generate is guided, and siblings of one prompt, "n" with guide_group, '
            "are pruned here)"
        )
    if by_default:
        return (
            "use_beam_search was given to a server that guides by default, but vLLM's beam search "
            'cannot be guided: drop it, or pass vllm_xargs {"guide": 0} for plain beams'
        )
    return None


def is_true(value: object) -> bool:
    """Whether vLLM's own model of a request takes a value for true."""
    try:
        return _TRUE.validate_python(value)
    except ValidationError:
        return False
