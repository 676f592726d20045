"""The lines that `trace` reads: prompts to decode, and responses that others decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_decode.cli.chat_rows import Messages, read_messages, read_responses
from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import parse, place, read_lines
from guided_decode.cli.rollout_rows import RolloutRow, rollout_row

Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Recorded:
    """A response that is there already.

    row: prompt and response, as text or token ids. guided: it was drawn from guided probabilities.
    tokens: how many it had, where its line says so. visits: of each token's alternatives in a tree
    search, by token id. facts: what its line says of it.
    """

    name: str
    row: RolloutRow
    guided: bool = False
    tokens: int | None = None
    visits: Sequence[Mapping[int, int]] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One prompt. recorded: its responses; none are to be decoded. method, chosen: of a search.

    messages: empty where the prompt came as token ids.
    """

    where: str
    name: str
    messages: Messages
    recorded: Sequence[Recorded] = ()
    method: str | None = None
    chosen: int | None = None


def read_trace_rows(source: Path, lines: Sequence[int], limit: int) -> list[TraceRow]:
    """The prompts of a .jsonl file or of stdin, "-".

    Lines of `search`, `generate --json` and `generate --compare --json` are known; any other is a
    chat, with or without its response or responses, as `score` and `train-critic` read them.

    lines: their numbers; empty: the first `limit`.

    Raises Refusal: a broken line, by its number, or one that is asked for and not there. OSError:
    it cannot be read.
    """
    rows: list[TraceRow] = []
    missing = set(lines)
    for number, line in read_lines(source):
        if (lines and number not in missing) or (not lines and len(rows) == limit):
            continue
        missing.discard(number)
        where = place(source, number)
        try:
            rows.append(_row(number, where, parse(line)))
        except Refusal as error:
            raise Refusal(f"{where}: {error}") from error
    if missing:
        raise Refusal(f"--line {min(missing)}: {source} has no such line, or a blank one")
    if not rows:
        raise Refusal(f"{source} holds no line: expected a chat, or a search's result, one a line")
    return rows


def _row(number: int, where: str, given: Any) -> TraceRow:
    fields = given if isinstance(given, dict) else {}
    if isinstance(fields.get("error"), str):
        raise Refusal(f"no response, but an error: {fields['error'][:200]}")
    read = next((read for knows, read in _SHAPES if knows(fields)), _of_chat)
    return read(_Line(number, where, given))


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    where: str
    given: Any

    @property
    def messages(self) -> Messages:
        """The conversation up to the response."""
        return read_messages({name: self.given[name] for name in ("messages", "prompt")
                              if name in self.given})  # fmt: skip

    def answered(self, messages: Messages, text: Any, ended: bool | None) -> RolloutRow:
        """A response of text to a conversation."""
        if not isinstance(text, str):
            raise Refusal(f"a response is {str(text)[:60]!r}: expected text")
        return RolloutRow(
            self.number, self.where, "", messages=messages, response=text, finished=ended
        )

    def row(self, messages: Messages, recorded: Sequence[Recorded], **search: Any) -> TraceRow:
        return TraceRow(self.where, f"line {self.number}", messages, recorded, **search)


def _of_search(line: _Line) -> TraceRow:
    given, messages = line.given, line.messages
    if not given["candidates"]:
        raise Refusal("the search found no response")
    details = given.get("details")
    visits = _visits(details.get("visits")) if isinstance(details, dict) else ()
    recorded = []
    for i, each in enumerate(given["candidates"]):
        if not isinstance(each, dict):
            raise Refusal(f"candidate {i} is {str(each)[:60]!r}: expected what search writes")
        facts = {name: _fact(each.get(name)) for name in ("score", "log_prob", "ended", "answer")}
        # A stop string is no end that a policy's token makes.
        row = line.answered(messages, each.get("response"), each.get("ended") == "eos")
        own = visits if len(given["candidates"]) == 1 else ()
        recorded.append(
            Recorded(f"response {i + 1}", row, False, _count(each.get("tokens")), own, facts)
        )
    chosen = _count(given.get("chosen"))
    if chosen is not None and chosen >= len(recorded):
        raise Refusal(f"chosen is {chosen}: expected one of {len(recorded)} candidates, from 0")
    return line.row(messages, recorded, method=given["method"], chosen=chosen)


def _of_comparison(line: _Line) -> TraceRow:
    messages, recorded = line.messages, []
    for name in ("plain", "guided"):
        own = line.given[name]
        row = line.answered(messages, own.get("text"), own.get("finished") is True)
        # Texts that are nothing stand for tokens, too.
        count = len(own["tokens"]) if isinstance(own.get("tokens"), list) else None
        recorded.append(Recorded(name, row, name == "guided", count, facts=_ended(own)))
    return line.row(messages, recorded)


def _of_generate(line: _Line) -> TraceRow:
    given, messages = line.given, line.messages
    row = line.answered(messages, given["text"], given.get("finished") is True)
    return line.row(
        messages,
        [Recorded("guided", row, True, _count(given.get("tokens")), facts=_ended(given))],
    )


def _of_preference(line: _Line) -> TraceRow:
    recorded = []
    for side in read_responses(line.given):
        for i, chat in enumerate(side.chats):
            name = f"{side.field} {i + 1}" if side.listed else side.field
            row = line.answered(chat[:-1], chat[-1]["content"], None)
            recorded.append(Recorded(name, row))
    return line.row(recorded[0].row.messages, recorded)


def _of_chat(line: _Line) -> TraceRow:
    row = rollout_row(line.number, line.where, line.given)
    return line.row(row.messages, [Recorded("response", row)] if row.answered else [])


def _has(*names: str, kind: type) -> Callable[[Mapping[str, Any]], bool]:
    return lambda fields: all(isinstance(fields.get(name), kind) for name in names)


_SHAPES: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[_Line], TraceRow]], ...] = (
    (lambda f: isinstance(f.get("method"), str) and isinstance(f.get("candidates"), list),
     _of_search),
    (_has("plain", "guided", kind=dict), _of_comparison),
    (_has("prompt", "text", kind=str), _of_generate),
    (lambda f: "chosen" in f and "rejected" in f, _of_preference),
)  # fmt: skip


def _ended(given: Mapping[str, Any]) -> dict[str, Fact]:
    return {"finished": given.get("finished") is True}


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _fact(value: Any) -> Fact:
    return value if isinstance(value, str | int | float | bool) else None


def _visits(value: Any) -> Sequence[Mapping[int, int]]:
    """Visits by token id, as JSON has them: with text for numbers."""
    if not isinstance(value, list):
        return ()
    try:
        return [{int(token): int(count) for token, count in each.items()} for each in value]
    except (AttributeError, TypeError, ValueError):
        return ()
