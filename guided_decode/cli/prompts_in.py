"""Where prompts come from: an option, a file, stdin, or somebody at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guided_decode.cli.chats import Messages, read_messages
from guided_decode.cli.errors import Refusal


def read_prompts(prompt: str | None, file: Path | None, *, raw: bool) -> Iterator[Messages]:
    """Conversations to answer, one after the other.

    A file that ends in .jsonl has one a line; any other file, and stdin, is the text of one
    user message, less the newline at its end unless it is raw. At a terminal, each line that is
    typed is one, until the end of input.

    Raises Refusal: both or no input, or a broken line (by its number).
    """
    if prompt is not None and file is not None:
        raise Refusal("--prompt and --file were both given: pass one of them")
    if prompt is not None:
        return iter([_user(prompt, "--prompt")])
    if file is not None and file.suffix == ".jsonl":
        return iter(list(_chats(file)))
    if file is not None:
        return iter([_user(_trimmed(read_text(file), raw), str(file))])
    if not sys.stdin.isatty():
        return iter([_user(_trimmed(sys.stdin.read(), raw), "stdin")])
    return _typed()


def read_jsonl(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Each line that is not blank: its number, its text and its JSON value.

    Raises Refusal for a line that is no JSON, by its number.
    """
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise Refusal(f"{file}, line {number}: not JSON ({error})") from error
        yield number, line, value


def _chats(file: Path) -> Iterator[Messages]:
    for number, _, value in read_jsonl(file):
        try:
            yield read_messages(value)
        except Refusal as error:
            raise Refusal(f"{file}, line {number}: {error}") from error


def read_text(file: Path) -> str:
    """A file's text. Raises Refusal where it is not UTF-8, OSError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"{file}: not UTF-8 text ({error.reason})") from error


def _user(text: str, source: str) -> Messages:
    if not text.strip():
        raise Refusal(f"{source} holds no prompt: expected text")
    return [{"role": "user", "content": text}]


def _trimmed(text: str, raw: bool) -> str:
    """Text as it was meant: editors and shells end it with a newline."""
    return text if raw else text.removesuffix("\n")


def _typed() -> Iterator[Messages]:
    while True:
        try:
            text = input("prompt> ")
        except EOFError:
            print()
            return
        if text.strip():
            yield _user(text, "the prompt")
