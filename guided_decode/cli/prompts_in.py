"""Where prompts come from: an option, a file, stdin, or somebody at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_decode.cli.chat_rows import Messages, read_messages
from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import STDIN, parse, place, read_lines, read_text, source_name


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to answer.

    messages: the conversation; problem: why there is none. where: what errors call its place, ""
    where there is nothing to say. line: its number in a file of chats. typed: somebody waits.
    """

    messages: Messages = ()
    problem: str | None = None
    where: str = ""
    line: int | None = None
    typed: bool = False

    def fields(self) -> dict[str, Any]:
        """How an answer's JSON names what it answers."""
        line = {} if self.line is None else {"line": self.line}
        return {**line, "prompt": self.messages[-1]["content"]}


def read_prompts(
    prompt: str | None, file: Path | None, *, raw: bool, skip: bool = False
) -> Iterator[Prompt]:
    """Conversations to answer, one after the other.

    A file that ends in .jsonl has one a line; any other file, and stdin, is the text of one
    user message, less the newline at its end unless it is raw. At a terminal, each line that is
    typed is one, until the end of input.

    skip: a broken line comes with its problem, instead of being refused.

    Raises Refusal: both or no input, or a broken line (by its number).
    """
    if prompt is not None and file is not None:
        raise Refusal("--prompt and --file were both given: pass one of them")
    if prompt is not None:
        return iter([Prompt(_user(_whole(prompt, "--prompt"), "--prompt"))])
    if file is not None and file.suffix == ".jsonl":
        return iter(_chats(file, skip))
    if file is None and sys.stdin.isatty():
        return _typed()
    file = STDIN if file is None else file
    name = source_name(file)
    return iter([Prompt(_user(_trimmed(read_text(file), raw), name), where=name)])


def _chats(file: Path, skip: bool) -> list[Prompt]:
    prompts = []
    for number, line in read_lines(file):
        where = place(file, number)
        try:
            prompts.append(Prompt(read_messages(parse(line)), where=where, line=number))
        except Refusal as error:
            if not skip:
                raise Refusal(f"{where}: {error}") from error
            prompts.append(Prompt(problem=str(error), where=where, line=number))
    if not prompts:
        raise Refusal(f"{file} holds no prompt: expected one chat a line")
    return prompts


def _user(text: str, source: str) -> Messages:
    if not text.strip():
        raise Refusal(f"{source} holds no prompt: expected text")
    return [{"role": "user", "content": text}]


def _whole(text: str, source: str) -> str:
    """Text whose every character is one: what is typed in another encoding has halves of some."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"{source} holds {text[error.start]!a}, which is no character: expected "
                      "UTF-8 text") from error  # fmt: skip
    return text


def _trimmed(text: str, raw: bool) -> str:
    """Text as it was meant: editors and shells end it with a newline."""
    return text if raw else text.removesuffix("\n")


def _typed() -> Iterator[Prompt]:
    while True:
        try:
            text = input("prompt> ")
        except EOFError:
            print()
            return
        try:
            if text.strip():
                yield Prompt(_user(_whole(text, "the prompt"), "the prompt"), typed=True)
        except Refusal as error:
            yield Prompt(problem=str(error), typed=True)
