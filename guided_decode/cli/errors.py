"""How commands fail: bad input is one line on stderr and exit code 2, never a traceback."""

import os
import sys
from typing import Any, cast

import typer
from typer.core import TyperGroup

BAD_INPUT = 2
INTERRUPTED = 130

# The common base of click's usage errors; some versions of typer carry their own click.
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


class Refusal(Exception):
    """Input that a command cannot use; its text is the whole message."""


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


class OneLineErrors(TyperGroup):
    """Ends the process with the right exit code, and with one line instead of a traceback.

    ValueError and OSError are what the package's public functions raise for bad input.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except _UsageError as error:
            code = _fail(error.format_message())  # type: ignore[attr-defined]
        except (Refusal, ValueError, ImportError) as error:
            code = _fail(one_line(error))
        except BrokenPipeError:
            # The reader of our output left; nothing more can be said to it, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except OSError as error:
            code = _fail(_describe(error))
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    # No message comes where the help was shown instead.
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _describe(error: OSError) -> str:
    if error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)
