"""The lines that `score` reads and writes: what is scored of each, and what is passed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_decode.cli.chat_rows import CONVERSATION, Messages, Responses, read_responses
from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import parse, place, read_lines
from guided_decode.cli.run_identity import digest

# Fields of an output line. Those of an input line that are called so come in "input".
_OURS = ("line", "score", "tokens", "values", "error", "key", "run", "input")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the input.

    number: the line's. where: its file, too. key: its text, as a digest. passed: the fields that
    are passed on. responses: what is scored. problem: why it cannot be, where it is no chat.
    """

    number: int
    where: str
    key: str
    passed: dict[str, Any] = field(default_factory=dict)
    responses: list[Responses] = field(default_factory=list)
    problem: str | None = None

    @property
    def chats(self) -> list[Messages]:
        """All its conversations, in order."""
        return [chat for responses in self.responses for chat in responses.chats]

    def scored(self, answers: Sequence[dict[str, Any]], run: str) -> dict[str, Any]:
        """The output line, of one answer for each of `chats`."""
        rest = list(answers)
        line: dict[str, Any] = {}
        for responses in self.responses:
            own, rest = rest[: len(responses.chats)], rest[len(responses.chats) :]
            if not responses.field:
                line |= own[0]
            else:
                line[responses.field] = own if responses.listed else own[0]
        return self._line(line, run)

    def skipped(self, reason: str, run: str) -> dict[str, Any]:
        """The output line of a row that cannot be scored."""
        return self._line({"error": reason}, run)

    def _line(self, own: dict[str, Any], run: str) -> dict[str, Any]:
        return {"line": self.number, **self.passed, **own, "key": self.key, "run": run}


def read_rows(source: Path, *, skip: bool) -> list[Row]:
    """All rows of the input.

    skip: a broken row comes with its problem; else it is refused, by its line, before anything is
    scored.

    Raises Refusal: as said, or the input has no line. OSError: it cannot be read.
    """
    rows = []
    for number, line in read_lines(source):
        where, key = place(source, number), digest(line.decode(errors="backslashreplace"))
        try:
            given = parse(line)
            rows.append(Row(number, where, key, _passed(given), read_responses(given)))
        except Refusal as error:
            if not skip:
                raise Refusal(f"{where}: {error}") from error
            rows.append(Row(number, where, key, problem=str(error)))
    if not rows:
        raise Refusal(f"{source} holds no chat: expected one a line")
    return rows


def _passed(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        return {}
    others = {name: value for name, value in given.items() if name not in CONVERSATION}
    clashing = {name: others.pop(name) for name in _OURS if name in others}
    return others | ({"input": clashing} if clashing else {})
