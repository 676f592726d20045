"""How commands fail: bad input is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, cast

import typer
from typer.core import TyperGroup

from guided_decode.cli.flags import flags_of, in_flags
from guided_decode.cli.streams import flush_output, leave_unwritten, open_closed

UNREAD, BAD_INPUT = 1, 2
INTERRUPTED = 130

# What a write says that has no file's name.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

# The common base of click's usage errors; some versions of typer carry their own click.
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


# The flags of the command that runs, by Python's name of each.
_flags: ContextVar[Mapping[str, str]] = ContextVar("flags", default=MappingProxyType({}))


class Refusal(Exception):
    """Input that a command cannot use; its text is the whole message."""


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def typed(error: BaseException) -> str:
    """The same in the words of the command that runs: its flags for Python's arguments."""
    return in_flags(one_line(error), _flags.get())


class OneLineErrors(TyperGroup):
    """Ends the process with the right exit code, and with one line instead of a traceback.

    ValueError and OSError are what the package's public functions raise for bad input. Output that
    cannot be written is an error as any other; only a reader that left is not told of it.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click does; its flags are what errors speak of from here on."""
        found = super().resolve_command(ctx, args)
        _flags.set(flags_of(found[1]))
        return found

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        _flags.set(MappingProxyType({}))
        open_closed()
        try:
            code = super().main(*args, **kwargs)
            flush_output()
        except SystemExit as ended:
            code = ended.code
        except _UsageError as error:
            code = _fail(error.format_message())  # type: ignore[attr-defined]
        except UnicodeEncodeError as error:
            code = _fail(_describe_encoding(error))
        except (Refusal, ValueError, ImportError) as error:
            code = _fail(typed(error))
        except BrokenPipeError:
            code = UNREAD
        except OSError as error:
            code = _fail(_describe(error))
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        leave_unwritten()
        sys.exit(code if isinstance(code, int) else 0)


def warn(message: str) -> None:
    """Says on stderr what the reader should know; the command goes on."""
    _say(f"warning: {message}")


def report(message: str) -> None:
    """Says on stderr what failed, of a command that goes on."""
    _say(f"error: {message}")


def _fail(message: str) -> int:
    # No message comes where the help was shown instead.
    if message:
        report(message)
    return BAD_INPUT


def _say(message: str) -> None:
    # Where stderr cannot be written either, the exit code has to do.
    with contextlib.suppress(OSError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)


def _describe(error: OSError) -> str:
    if error.errno in _UNWRITABLE and not error.filename:
        return f"the output cannot be written: {error.strerror}"
    if error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)


def _describe_encoding(error: UnicodeEncodeError) -> str:
    text = error.object[error.start : error.end]
    return (
        f"{text!a} cannot be written in the {error.encoding} encoding: expected UTF-8; "
        "set PYTHONUTF8=1 or PYTHONIOENCODING=utf-8"
    )
