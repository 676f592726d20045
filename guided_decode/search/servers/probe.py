"""Asking servers what they serve and how exactly they answer, before a search relies on it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from guided_decode.search.draws import Draw
from guided_decode.search.http import Body, Endpoints
from guided_decode.search.http_failures import EndpointError, RequestRefused
from guided_decode.search.pooling_wire import read_models
from guided_decode.search.requests import Sampling
from guided_decode.search.servers.completions import (
    Inexact,
    NoLogProbs,
    check_prompt,
    read_continuation,
    the_choice,
    top_log_probs,
)
from guided_decode.search.servers.dialect import DIALECTS, PATH, Served, draw_body, next_body

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of no model's own format, and with something for every tokenizer to disagree about.
_TEXT = "  The 1,024 naïve answers: 12 + 7 =\n\tx_i"
_SHOWN = 5
_NOT_FOUND = 404
# Nats that the same model may differ by, in 16 bits and on other cards.
_SAME = 0.3


def probe(
    endpoints: Endpoints,
    *,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    model: str | None,
) -> Served:
    """What all servers can do, by asking each.

    Raises ValueError: they serve another model, or are not exact; the message says in what.
    EndpointError: one does not answer.
    """
    names, longest = _models(endpoints, model)
    served = Served(names, "vllm", ends, tokenizer, longest)
    served = _dialect(endpoints, served)
    if served.dialect == "vllm":
        _check_tokenizer(endpoints, served)
    _check_log_probs(endpoints, served)
    return served


def _models(endpoints: Endpoints, model: str | None) -> tuple[str, int | None]:
    """The model's name on all servers, and the longest text that all of them take."""
    try:
        lists = endpoints.get_from_each("/v1/models", read_models)
    except EndpointError as error:
        # Servers need not have the list; one that is not there has nothing else either.
        if model is None or error.status != _NOT_FOUND:
            raise
        return model, None
    lengths: list[int] = []
    for url, listed in zip(endpoints.urls, lists, strict=True):
        names = [each.name for each in listed]
        if model is None:
            if len(names) != 1:
                raise ValueError(f"{url} serves {', '.join(names)}: pass model=, one of them")
            model = names[0]
        if model not in names:
            raise ValueError(f"{url} serves {', '.join(names)}, and not {model}")
        longest = listed[names.index(model)].max_tokens
        lengths += [longest] if isinstance(longest, int) else []
    assert model is not None
    return model, min(lengths, default=None)


def _dialect(endpoints: Endpoints, served: Served) -> Served:
    """The first dialect in which all servers continue a prompt. Raises ValueError: none is."""
    prefix = tuple(served.tokenizer.encode(_TEXT, add_special_tokens=False))
    draw = Draw(prefix, 1, Sampling(temperature=0.0), 0)
    refusals = []
    for dialect in DIALECTS:
        spoken = replace(served, dialect=dialect)
        read = partial(_continues, draw, spoken)
        try:
            endpoints.post_to_each(PATH, draw_body(spoken, draw), read)
        except ValueError as error:
            refusals.append(str(error))
            continue
        return spoken
    raise ValueError("; ".join(dict.fromkeys(refusals)))


def _continues(draw: Draw, served: Served, answer: Any, body: Body) -> None:
    try:
        read_continuation(answer, draw, served)
    except NoLogProbs as error:
        # It is a server that gives none, and no mishap.
        raise Inexact(
            f"{served.model} is served with {error}: a search needs the log-probabilities of what "
            "was drawn, as vLLM's completions give them"
        ) from error


def _check_tokenizer(endpoints: Endpoints, served: Served) -> None:
    """Raises ValueError: a server reads a text as other tokens than the tokenizer here."""
    draw = Draw((0,), 1, Sampling(temperature=0.0), 0)
    expected = tuple(served.tokenizer.encode(_TEXT, add_special_tokens=False))

    def same(answer: Any, body: Body) -> bool:
        try:
            check_prompt(answer, the_choice(answer), expected, served)
        except Inexact:
            return False
        return True

    try:
        alike = endpoints.post_to_each(PATH, draw_body(served, draw) | {"prompt": _TEXT}, same)
    except RequestRefused:
        # A server without a tokenizer reads no text, and needs none.
        return
    for url, is_same in zip(endpoints.urls, alike, strict=True):
        if not is_same:
            raise ValueError(f"{url} serves {served.model} with another tokenizer than the "
                             "policy's here: pass the served model's own")  # fmt: skip


def _check_log_probs(endpoints: Endpoints, served: Served) -> None:
    """Raises ValueError: they follow temperature or top-p, or differ between the servers."""
    prefix = tuple(served.tokenizer.encode(_TEXT, add_special_tokens=False))
    body = next_body(served, prefix, _SHOWN) | {"seed": 1}
    read = partial(_top, served)
    tops = [
        endpoints.post_to_each(PATH, body | {"temperature": heat, "top_p": mass}, read)
        for heat, mass in ((1.0, 1.0), (0.5, 0.9))
    ]
    for name, plain, tempered in zip(endpoints.urls, *tops, strict=True):
        if follows_temperature(plain, tempered):
            raise ValueError(
                f"{name} gives log-probabilities after temperature and top-p, and a search needs "
                "the policy's own: start vLLM with --logprobs-mode raw_logprobs, its default"
            )
    for name, other in zip(endpoints.urls[1:], tops[0][1:], strict=True):
        shared = tops[0][0].keys() & other.keys()
        if not shared or max(abs(tops[0][0][each] - other[each]) for each in shared) > _SAME:
            raise ValueError(
                f"{endpoints.urls[0]} and {name} serve different models as {served.model}: their "
                "log-probabilities of the same tokens differ"
            )


def _top(served: Served, answer: Any, body: Body) -> dict[Any, float]:
    """The likeliest tokens' log-probabilities, by id or by text, which will do to compare them."""
    if served.dialect == "vllm":
        return dict(top_log_probs(answer, served))
    top = (the_choice(answer).get("logprobs") or {}).get("top_logprobs")
    if not isinstance(top, list) or not top or not isinstance(top[0], dict):
        raise ValueError("an answer without top_logprobs")
    return dict(top[0])


def follows_temperature(plain: dict[Any, float], halved: dict[Any, float]) -> bool:
    """Whether log-probabilities at temperature 0.5 are those at 1, sharpened.

    What is sharpened has twice the distance between two tokens.
    """
    shared = sorted(plain.keys() & halved.keys(), key=lambda each: plain[each])
    if len(shared) < 2:
        # Top-p has taken all but one away, or all are new.
        return len(plain) > 1
    low, high = shared[0], shared[-1]
    distance, other = plain[high] - plain[low], halved[high] - halved[low]
    return other > 1.5 * distance and other - distance > 1e-3
