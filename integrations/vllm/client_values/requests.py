"""What a request's body says of values, and the body that vLLM gets instead."""

import json
from typing import Any, NamedTuple

from guided_decode.integrations.vllm.beam_refusal import is_true

_VALUES, _NAME = "guide_values", "guide_values_id"


class Asked(NamedTuple):
    """A request that asks for values.

    request: as it came. keeps_ids: the client asked for token ids itself. choices: that its
    response will have.
    """

    request: dict[str, Any]
    keeps_ids: bool
    choices: int

    def body(self, name: str) -> bytes:
        """What goes on to vLLM. name: the request's, which a client's own does not give way to."""
        given = {_NAME: name, **self.request["vllm_xargs"]}
        return json.dumps({**self.request, "vllm_xargs": given, "return_token_ids": True}).encode()


def asked_of(body: bytes) -> Asked | None:
    """What a body asks for; None where it goes on as it is.

    Raises ValueError: it asks for what cannot be had.
    """
    if _VALUES.encode() not in body:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        # For vLLM to refuse.
        return None
    given = request.get("vllm_xargs") if isinstance(request, dict) else None
    if not isinstance(given, dict) or given.get(_VALUES) not in (1, True):
        return None
    keeps_ids = is_true(request.get("return_token_ids"))
    _refuse(request, keeps_ids=keeps_ids)
    return Asked(request, keeps_ids, _choices(request))


def _choices(request: dict[str, Any]) -> int:
    prompt, samples = request.get("prompt"), request.get("n")
    prompts = 1
    # A prompt in token ids is a list as well.
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
        prompts = len(prompt)
    try:
        return prompts * int(samples or 1)
    except (TypeError, ValueError):
        # For vLLM to refuse.
        return prompts


def _refuse(request: dict[str, Any], *, keeps_ids: bool) -> None:
    if is_true(request.get("use_beam_search")):
        raise ValueError(
            f"use_beam_search was given together with {_VALUES}, but vLLM's beam search drops "
            "vllm_xargs: drop one of them"
        )
    if is_true(request.get("echo")) and "prompt" in request and not keeps_ids:
        # With token ids vLLM leaves the prompt out of the text.
        raise ValueError(
            f"echo was given together with {_VALUES}, which needs the response's token ids, and "
            "with them vLLM echoes no text: drop one of them, or ask for return_token_ids"
        )
