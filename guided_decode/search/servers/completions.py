"""Reading of completions: exactly the tokens that were drawn, and their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from guided_decode.search.draws import Draw
from guided_decode.search.http_failures import RequestRefused
from guided_decode.search.requests import Continuation, Reason, Tokens
from guided_decode.search.servers.dialect import Served
from guided_decode.search.stop_strings import StopStrings

_ID = "token_id:"
# What vLLM writes for −inf, which JSON has not.
_NEVER = -9999.0
# Log-probabilities of 16 bits are this much above 0 at most.
_ROUNDING = 1e-2


class Inexact(RequestRefused):
    """An answer of which something is not known exactly, as of all others that would come."""


class NoLogProbs(ValueError):
    """An answer without log-probabilities."""


def read_continuation(answer: Any, draw: Draw, served: Served) -> Continuation:
    """The continuation that an answer holds.

    Raises ValueError: it is no answer to this. Inexact: it is one that a search cannot use.
    """
    choice = the_choice(answer)
    check_prompt(answer, choice, draw.prefix, served)
    log_probs = _log_probs(choice, served)
    tokens = _tokens(choice, len(log_probs), served)
    if not tokens or len(tokens) > draw.max_tokens:
        raise ValueError(f"{len(tokens)} tokens where 1 to {draw.max_tokens} were asked for")
    # Of a server that was not told of an end, what comes after it was drawn in vain.
    end = next((i for i, token in enumerate(tokens) if token in served.ends), None)
    if end is not None:
        return Continuation(tokens[: end + 1], log_probs[: end + 1], "eos")
    return Continuation(tokens, log_probs, _reason(choice, tokens, draw, served))


def the_choice(answer: Any) -> dict[str, Any]:
    """The only choice of an answer. Raises ValueError: there is none, or more."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise ValueError(f"an answer without choices: {str(answer)[:200]}")
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"{len(choices)} choices where 1 was asked for")
    return choices[0]


def check_prompt(answer: Any, choice: dict[str, Any], prefix: Tokens, served: Served) -> None:
    """Raises Inexact: the server read another prompt than it was sent."""
    read = choice.get("prompt_token_ids")
    if read is not None:
        same, what = list(read) == list(prefix), f"{len(read)} others"
    else:
        usage = answer.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        same, what = count in (None, len(prefix)), f"{count}"
    if not same:
        raise Inexact(
            f"{served.model}'s server was sent {len(prefix)} prompt tokens and read {what}: it "
            "cuts prompts, adds tokens of its own (BOS), or has another tokenizer"
        )


def top_log_probs(answer: Any, served: Served, place: int = 0) -> dict[int, float]:
    """The log-probabilities of a place's likeliest tokens, by id, those of no probability left out.

    Raises ValueError: there are none. Inexact: they are told by text, which names no token.
    """
    choice = the_choice(answer)
    given = _of(choice, "top_logprobs", "tokens")
    if len(given) <= place or not isinstance(given[place], dict):
        raise ValueError("an answer without top_logprobs")
    return {
        _id(name, served): _checked(value, served)
        for name, value in given[place].items()
        if value is not None and value > _NEVER
    }


def _of(choice: dict[str, Any], *names: str) -> list[Any]:
    """A list of the choice's logprobs. Raises NoLogProbs: it has none."""
    logprobs = choice.get("logprobs")
    found = logprobs.get(names[0]) if isinstance(logprobs, dict) else None
    if not isinstance(found, list):
        raise NoLogProbs(f"an answer without log-probabilities (logprobs.{names[0]})")
    return found


def _log_probs(choice: dict[str, Any], served: Served) -> tuple[float, ...]:
    return tuple(_checked(value, served) for value in _of(choice, "token_logprobs"))


def _checked(value: Any, served: Served) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value} where a log-probability was expected")
    if value > _ROUNDING:
        raise Inexact(
            f"{served.model}'s server says {value:.3f} where a log-probability was expected, which "
            "is 0 at most: start vLLM with --logprobs-mode raw_logprobs, its default"
        )
    return min(float(value), 0.0)


def _id(name: str, served: Served) -> int:
    digits = name.removeprefix(_ID)
    if not name.startswith(_ID) or not digits.isdigit():
        raise Inexact(
            f"{served.model}'s server names tokens by their text ({name!r}), which may be several "
            "tokens': this method needs a server that names ids, as vLLM's does"
        )
    return int(digits)


def _tokens(choice: dict[str, Any], count: int, served: Served) -> Tokens:
    """The tokens that were drawn; count: of log-probabilities."""
    given = choice.get("token_ids")
    if given is None and served.dialect == "vllm":
        # Servers before 0.10.2 have them here alone.
        given = [_id(name, served) for name in _of(choice, "tokens")]
    if given is None:
        return _taken_again(choice, count, served)
    if not all(isinstance(token, int) and token >= 0 for token in given):
        raise ValueError(f"token ids {str(given)[:100]}: expected integers of at least 0")
    if len(given) != count:
        raise ValueError(f"{len(given)} token ids and {count} log-probabilities")
    return tuple(given)


def _taken_again(choice: dict[str, Any], count: int, served: Served) -> Tokens:
    """The tokens of a text, where each is the one that the server names by its text.

    Raises Inexact: they are not known exactly.
    """
    text, names = choice.get("text"), _of(choice, "tokens")
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    tokenizer = served.tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if choice.get("finish_reason") == "stop" and len(ids) == count - 1:
        # The end is in no text, and only one token can stand for it.
        ids.append(tokenizer.eos_token_id if len(served.ends) == 1 else _end(names[-1], served))
    alike = len(ids) == count == len(names) and all(
        token in served.ends or name in _names_of(token, served)
        for token, name in zip(ids, names, strict=True)
    )
    if not alike:
        raise Inexact(
            f"{served.model} is served without token ids, and its text {text[:60]!r} does not say "
            f"which {count} tokens were drawn: serve it by vLLM, which returns them"
        )
    return tuple(ids)


def _end(name: str, served: Served) -> int:
    found = [token for token in served.ends if name in _names_of(token, served)]
    if len(found) != 1:
        raise Inexact(
            f"{served.model} is served without token ids, and {len(served.ends)} tokens end its "
            "responses: which one did is unknown; serve it by vLLM, which returns ids"
        )
    return found[0]


def _names_of(token: int, served: Served) -> Sequence[str]:
    """What a server may call a token: its piece, or its text."""
    piece = str(served.tokenizer.convert_ids_to_tokens(token))
    return piece, str(served.tokenizer.decode([token], skip_special_tokens=False))


def _reason(choice: dict[str, Any], tokens: Tokens, draw: Draw, served: Served) -> Reason:
    """Why it ended, where no token of it is an end. Raises as `read_continuation`."""
    said, by = choice.get("finish_reason"), choice.get("stop_reason")
    if said == "length":
        if len(tokens) < draw.max_tokens:
            raise Inexact(
                f"{served.model}'s server wrote {len(tokens)} of {draw.max_tokens} tokens after a "
                f"prefix of {len(draw.prefix)}: it has no room for more (max_model_len"
                f"{'' if served.max_model_len is None else f' {served.max_model_len}'})"
            )
        return "length"
    if said != "stop":
        raise ValueError(f"a continuation that ended by {said!r}")
    stops = draw.sampling.stop
    if stops and (by in stops or StopStrings(served.tokenizer, stops).completed(tokens)):
        return "stop"
    raise Inexact(
        f"{served.model}'s server ended a response at token {tokens[-1]}, which ends none here "
        f"({', '.join(map(str, sorted(served.ends)))} do): pass eos_token_ids=, all that do"
    )
