"""What a request's body says of values, and the body that vLLM gets instead."""

import json
from typing import Any, NamedTuple

_VALUES, _NAME = "guide_values", "guide_values_id"


class Asked(NamedTuple):
    """body: as it goes on to vLLM. keeps_ids: the client asked for token ids itself. choices: that
    its response will have, or more."""

    body: bytes
    keeps_ids: bool
    choices: int


def asked_of(body: bytes, name: str) -> Asked | None:
    """What becomes of a body that asks for values; None where it goes on as it is.

    name: the request's.

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
    if not isinstance(given, dict):
        return None
    if _NAME in given:
        raise ValueError(
            f"{_NAME} is for engines in process: over HTTP the server chooses it; drop it"
        )
    if given.get(_VALUES) not in (1, True):
        return None
    keeps_ids = bool(request.get("return_token_ids"))
    _refuse(request, keeps_ids=keeps_ids)
    request["vllm_xargs"] = {**given, _NAME: name}
    request["return_token_ids"] = True
    return Asked(json.dumps(request).encode(), keeps_ids, _choices(request))


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
    if request.get("use_beam_search"):
        raise ValueError(
            f"use_beam_search was given together with {_VALUES}, but vLLM's beam search drops "
            "vllm_xargs: drop one of them"
        )
    if request.get("echo") and "prompt" in request and not keeps_ids:
        # With token ids vLLM leaves the prompt out of the text.
        raise ValueError(
            f"echo was given together with {_VALUES}, which needs the response's token ids, and "
            "with them vLLM echoes no text: drop one of them, or ask for return_token_ids"
        )
