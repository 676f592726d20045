"""The lines that `train-critic` and `report-card` read: prompts, responses, rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_decode.cli.chat_rows import CONVERSATION, Messages, read_messages
from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import parse, place, read_lines
from guided_decode.cli.run_identity import digest

# A response's token ids; a prompt's. Those of text are found by the policy's chat format.
_IDS = ("prompt_ids", "response_ids")
_RESPONSES = ("response", "completion")
# What a line of ours has; of an input line's own fields none of these is passed on.
_OURS = (*CONVERSATION, *_IDS, "line", "sample", "reward", "finished", "ended", "key", "run")


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """One line.

    number, where, key: as of `score_rows.Row`. given: all its fields. messages: the prompt; empty
    where it came as prompt_ids. response: text; response_ids: its token ids; None where there is
    none. reward: None where there is none. finished: whether the response has an end; None: not
    said.
    """

    number: int
    where: str
    key: str
    given: Mapping[str, Any] = field(default_factory=dict)
    messages: Messages = ()
    prompt_ids: tuple[int, ...] | None = None
    response: str | None = None
    response_ids: tuple[int, ...] | None = None
    reward: float | None = None
    finished: bool | None = None
    problem: str | None = None

    @property
    def answered(self) -> bool:
        """Whether it has a response."""
        return self.response is not None or self.response_ids is not None

    @property
    def passed(self) -> dict[str, Any]:
        """Its fields that are none of ours."""
        return {name: value for name, value in self.given.items() if name not in _OURS}

    @property
    def prompt(self) -> Any:
        """What a judge of text is asked about: the user's message, or all messages."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "user":
            return self.messages[0]["content"]
        return [dict(each) for each in self.messages]


def read_rollout_rows(source: Path) -> list[RolloutRow]:
    """All lines of a file. Raises Refusal: none, or one that is broken, by its number; some lines
    have a response or a reward and others not. OSError: it cannot be read."""
    rows = []
    for number, line in read_lines(source):
        where = place(source, number)
        try:
            rows.append(rollout_row(number, where, parse(line), digest(line.decode())))
        except Refusal as error:
            raise Refusal(f"{where}: {error}") from error
    if not rows:
        raise Refusal(f"{source} holds no line: expected prompts, or rollouts, one a line")
    for what, has in (("response", _answered), ("reward", _rewarded)):
        odd = next((row for row in rows if has(row) != has(rows[0])), None)
        if odd is not None:
            has_it, lacks_it = (odd, rows[0]) if has(odd) else (rows[0], odd)
            raise Refusal(f"{lacks_it.where}: no {what}, which {has_it.where} has: expected one "
                          "in each line, or in none")  # fmt: skip
    return rows


def _answered(row: RolloutRow) -> bool:
    return row.answered


def _rewarded(row: RolloutRow) -> bool:
    return row.reward is not None


def rollout_row(number: int, where: str, given: Any, key: str = "") -> RolloutRow:
    """The line of one JSON value. Raises Refusal: it is none."""
    if not isinstance(given, dict):
        given = {"messages": given}
    prompt_ids = _token_ids(given, "prompt_ids", "prompt")
    response_ids = _token_ids(given, "response_ids", *_RESPONSES)
    messages, response = _texts(given, prompt_ids is not None)
    if response is not None and not response and response_ids is None:
        raise Refusal("an empty response: expected text, or response_ids")
    return RolloutRow(
        number, where, key, given, messages, prompt_ids, response, response_ids,
        _reward(given), _finished(given),
    )  # fmt: skip


def _texts(given: Mapping[str, Any], has_ids: bool) -> tuple[Messages, str | None]:
    """The prompt's messages and the response's text, as far as they are there."""
    named = next((given[name] for name in _RESPONSES if name in given), None)
    response = named if isinstance(named, str) else None
    if has_ids and not isinstance(given.get("prompt"), str) and "messages" not in given:
        return (), response
    asked = {name: given[name] for name in ("messages", "prompt") if name in given}
    messages = read_messages(asked or given)
    if messages[-1]["role"] == "assistant":
        response = messages[-1]["content"] if response is None else response
        messages = messages[:-1]
    if named is not None and response is None and not _is_ids(named):
        messages_of_answer = read_messages({"prompt": "", "response": named})
        response = messages_of_answer[-1]["content"]
    if not messages:
        raise Refusal("a response without a prompt: expected messages or prompt")
    return messages, response


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _token_ids(given: Mapping[str, Any], *names: str) -> tuple[int, ...] | None:
    for name in names:
        value = given.get(name)
        if name in _IDS and value is not None and not _is_ids(value):
            raise Refusal(f"{name} came as {str(value)[:60]}: expected a list of token ids")
        if value is not None and _is_ids(value):
            if not value:
                raise Refusal(f"{name} is empty: expected at least one token id")
            return tuple(value)
    return None


def _reward(given: Mapping[str, Any]) -> float | None:
    value = given.get("reward")
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise Refusal(f"the reward came as {value!r}: expected a number")
    return float(value)


def _finished(given: Mapping[str, Any]) -> bool | None:
    value = given.get("finished")
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"finished came as {value!r}: expected true or false")
    return value
