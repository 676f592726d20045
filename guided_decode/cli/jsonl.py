"""Text and lines of JSON from files, pipes and stdin, whatever they hold."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from guided_decode.cli.errors import Refusal

STDIN = Path("-")
# Bytes. What is longer is no chat, and a device may never end.
LONGEST = 16 << 20
# Editors of other systems begin a file with it.
_BOM = b"\xef\xbb\xbf"


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number; "-" is stdin.

    Raises Refusal: a line is too long. OSError: the file cannot be read.
    """
    with _opened(file) as opened:
        number = 0
        while line := opened.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise Refusal(f"{place(file, number)}: more than {LONGEST >> 20} MiB: expected one "
                              "chat")  # fmt: skip
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield number, line.rstrip(b"\n")


def parse(line: bytes) -> Any:
    """The JSON value of a line, whose every part can be written again.

    Raises Refusal: it is no UTF-8, no JSON, or holds what JSON has no text for.
    """
    try:
        value = json.loads(line.decode(), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise Refusal(f"not UTF-8 text ({error.reason})") from error
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise Refusal(f"half a character, {lone!a}, in its text: expected Unicode") from error
    except RecursionError:
        raise Refusal("JSON that is nested too deeply: expected a chat") from None
    except ValueError as error:
        raise Refusal(f"not JSON ({error})") from error
    return value


def read_text(file: Path) -> str:
    """All of a file's text; "-" is stdin.

    Raises Refusal: it is no UTF-8, or too long. OSError: it cannot be read.
    """
    with _opened(file) as opened:
        read = opened.read(LONGEST + 1)
    name = source_name(file)
    if len(read) > LONGEST:
        raise Refusal(f"{name}: more than {LONGEST >> 20} MiB: expected a prompt")
    try:
        return read.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise Refusal(f"{name}: not UTF-8 text ({error.reason})") from error


def source_name(file: Path) -> str:
    """What errors call a file."""
    return "stdin" if file == STDIN else str(file)


def place(file: Path, number: int) -> str:
    """Where a line is."""
    return f"{source_name(file)}, line {number}"


def _opened(file: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    return contextlib.nullcontext(sys.stdin.buffer) if file == STDIN else open(file, "rb")


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
