"""The lines that `search` reads and writes: prompts, and what was found for each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_decode.cli.chat_rows import CONVERSATION, Messages, read_messages
from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import STDIN, parse, place, read_lines, read_text
from guided_decode.cli.run_identity import digest
from guided_decode.cli.token_values import rounded
from guided_decode.search.result import Candidate, SearchResult

# Fields of an output line. Those of an input line that are called so come in "input".
_OURS = ("line", "method", "seed", "response", "chosen", "score", "candidates", "stopped",
         "details", "cost", "error", "key", "run", "input")  # fmt: skip


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One prompt of the input. Fields as of `score_rows.Row`; index: its place among the rows."""

    index: int
    number: int
    where: str
    key: str
    passed: dict[str, Any] = field(default_factory=dict)
    messages: Messages = ()
    problem: str | None = None

    def line(self, own: Mapping[str, Any], run: str) -> dict[str, Any]:
        """Its output line, with what was found."""
        one = len(self.messages) == 1 and self.messages[0]["role"] == "user"
        prompt = self.messages[0]["content"] if one else [dict(each) for each in self.messages]
        head = {"line": self.number, **self.passed, **({"prompt": prompt} if prompt else {})}
        return {**head, **own, "key": self.key, "run": run}


def read_search_rows(source: Path | None, prompt: str | None, *, skip: bool) -> list[SearchRow]:
    """All prompts: the one that was typed, a file's text, or the lines of JSON of a file or stdin.

    A file that ends in .jsonl has a chat a line, and so has stdin; any other is one message.

    Raises Refusal: both or no input, none in it, or a broken line, unless broken ones are to be
    skipped. OSError: it cannot be read.
    """
    if (source is None) == (prompt is None):
        raise Refusal(
            "expected prompts: pass a file, - for stdin, or --prompt TEXT"
            if source is None
            else f"--prompt and {source} were both given: pass one of them"
        )
    if source is None or (source != STDIN and source.suffix != ".jsonl"):
        text = prompt if source is None else read_text(source).removesuffix("\n")
        name = "--prompt" if source is None else str(source)
        assert text is not None
        if not text.strip():
            raise Refusal(f"{name} holds no prompt: expected text")
        return [SearchRow(0, 1, name, digest(text), {}, [{"role": "user", "content": text}])]
    rows = [_row(i, *line, source, skip) for i, line in enumerate(read_lines(source))]
    if not rows:
        raise Refusal(f"{place(source, 1)}: no prompt: expected one chat a line")
    return rows


def _row(index: int, number: int, line: bytes, source: Path, skip: bool) -> SearchRow:
    where, key = place(source, number), digest(line.decode(errors="backslashreplace"))
    try:
        given = parse(line)
        messages = read_messages(given)
        if messages[-1]["role"] == "assistant":
            raise Refusal(
                "the chat ends with an assistant's turn: expected one that the policy has to answer"
            )
    except Refusal as error:
        if not skip:
            plain = "; plain text is given by a file or --prompt" if source == STDIN else ""
            raise Refusal(f"{where}: {error}{plain}") from error
        return SearchRow(index, number, where, key, problem=str(error))
    return SearchRow(index, number, where, key, _passed(given), messages)


def _passed(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        return {}
    others = {name: value for name, value in given.items() if name not in CONVERSATION}
    clashing = {name: others.pop(name) for name in _OURS if name in others}
    return others | ({"input": clashing} if clashing else {})


def why_ended(
    candidate: Candidate, result: SearchResult, max_tokens: int, ends: Collection[int]
) -> str:
    """Why a candidate goes no further: "eos", "length", "stop" (a stop string), "budget", or
    "search": the search came to its end without it."""
    if candidate.tokens and candidate.tokens[-1] in ends:
        return "eos"
    if len(candidate.tokens) >= max_tokens:
        return "length"
    if candidate.finished:
        return "stop"
    return "search" if result.stopped is None else "budget"


def as_json(value: Any) -> Any:
    """A method's figures as JSON has them: text as keys, floats rounded as scores are."""
    if isinstance(value, Mapping):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    return rounded(value) if isinstance(value, float) else value
