"""Conversations in the shapes that data sets have: ours, TRL's, RewardBench's."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_decode.cli.errors import Refusal

Message = Mapping[str, str]
Messages = Sequence[Message]
ROLES = ("system", "user", "assistant")
# A prompt's answer, and the two answers of a preference.
_ANSWER, _PREFERENCE = ("response", "completion"), ("chosen", "rejected")
# The fields of a row that are its conversation.
CONVERSATION = ("messages", "prompt", *_ANSWER, *_PREFERENCE)
_PROMPTS = "an object with messages or prompt"
_SHAPES = (
    "an object with messages, with prompt and response or completion, or with chosen and rejected"
)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 57


@dataclass(frozen=True, slots=True)
class Responses:
    """What is to be scored of a row.

    field: which of the row's this is, "chosen" say; "" where the row is one conversation.
    chats: conversations that an assistant ends. listed: the row has a list of them.
    """

    field: str
    chats: list[Messages]
    listed: bool = False


def read_messages(given: Any, expected: str = _PROMPTS) -> list[Message]:
    """The conversation of one JSON value.

    Accepted: {"messages": [{"role", "content"}, ...]}, such a list itself, and {"prompt"} with or
    without {"response"} or {"completion"}; each of them text or messages.

    expected: what is asked for where it is none of these.

    Raises Refusal: anything else; says what it is.
    """
    if isinstance(given, dict) and "messages" in given:
        given = given["messages"]
    elif isinstance(given, dict) and "prompt" in given:
        answers = [given[name] for name in _ANSWER if name in given][:1]
        parts = [(given["prompt"], "user"), *((answer, "assistant") for answer in answers)]
        given = [message for part in parts for message in _turns(*part)]
    if not isinstance(given, list) or not given:
        raise Refusal(f"{_shown(given)}: expected {expected}{_meant(given)}")
    return [_message(one, i) for i, one in enumerate(given)]


def _meant(given: Any) -> str:
    """What a field of an object may have been meant as, for an error."""
    for name in given if isinstance(given, dict) else ():
        if close := difflib.get_close_matches(name, CONVERSATION, n=1):
            return f" (did you mean {close[0]} by {name}?)"
    return ""


def read_responses(given: Any) -> list[Responses]:
    """The conversations of one JSON value that an assistant ends.

    Accepted: as `read_messages`, and {"chosen", "rejected"}, with {"prompt"} or with the prompt in
    them; each of them text, messages, or a list of texts.

    Raises Refusal: anything else; says what it is.
    """
    if not (isinstance(given, dict) and all(name in given for name in _PREFERENCE)):
        return [Responses("", [_ended(read_messages(given, _SHAPES))])]
    return [_side(given, name) for name in _PREFERENCE]


def _side(row: Mapping[str, Any], name: str) -> Responses:
    answer = row[name]
    listed = isinstance(answer, list) and all(isinstance(one, str) for one in answer)
    try:
        chats = [_answered(row, one) for one in (answer if listed else [answer])]
    except Refusal as error:
        raise Refusal(f"{name}: {error}") from error
    return Responses(name, chats, listed)


def _answered(row: Mapping[str, Any], answer: Any) -> Messages:
    turns = _turns(answer, "assistant")
    # Several turns are a whole conversation, whose prompt is said twice where it is a field too.
    prompt = _turns(row["prompt"], "user") if "prompt" in row and len(turns) < 2 else []
    return _ended(read_messages([*prompt, *turns]))


def _ended(messages: list[Message]) -> Messages:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise Refusal("expected a chat that ends with an assistant's response")
    return messages


def _turns(given: Any, role: str) -> list[Any]:
    return given if isinstance(given, list) else [{"role": role, "content": given}]


def _message(given: Any, index: int) -> Message:
    if not isinstance(given, dict) or given.get("role") not in ROLES:
        role = given.get("role") if isinstance(given, dict) else given
        raise Refusal(f"message {index} has the role {_shown(role)}: expected one of "
                      f"{', '.join(ROLES)}")  # fmt: skip
    if not isinstance(given.get("content"), str):
        raise Refusal(
            f"message {index} has the content {_shown(given.get('content'))}: expected text"
        )
    return {"role": given["role"], "content": given["content"]}


def _shown(value: Any) -> str:
    return _SHORT.repr(value)
