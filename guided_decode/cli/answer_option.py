"""`--answer`: the answer in a response, by a built-in extraction or a function of the user's."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.run_identity import fingerprint
from guided_decode.search.answers import ANSWERS, TextAnswer


@dataclass(frozen=True, slots=True)
class AnswerFunction:
    """A function of a response's text. known_as: what it is, for a run's identity."""

    name: str
    function: TextAnswer
    known_as: str

    def __call__(self, text: str) -> Hashable | None:
        """The answer. Raises Refusal: the function raises, or its answer cannot be counted."""
        try:
            given = self.function(text)
            hash(given)
        except Exception as error:
            # It is the user's own: it raises what it likes.
            raise Refusal(
                f"--answer {self.name} failed on a response: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error
        return given


def read_answer(name: str) -> AnswerFunction:
    """The function of a name, or of MODULE:FUNCTION, which is imported as from a script here.

    Raises Refusal: there is none.
    """
    if name in ANSWERS:
        return AnswerFunction(name, ANSWERS[name], name)
    function = import_function(
        name, "--answer", "a function of a response's text", f"one of {', '.join(ANSWERS)}, or "
    )
    return AnswerFunction(name, function, f"{name} {source_of(name, function)}")


def import_function(name: str, flag: str, what: str, others: str = "") -> Callable[..., Any]:
    """The function of MODULE:FUNCTION, which is imported as from a script here.

    flag, what, others: for errors: the option, what the function is, what else it takes.

    Raises Refusal: there is none.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise Refusal(f"{flag} {name}: expected {others}MODULE:FUNCTION, {what}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise Refusal(
            f"{flag} {name}: {module} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise Refusal(f"{flag} {name}: {module} has no function {attribute}")
    return cast(Callable[..., Any], function)


def source_of(name: str, function: Callable[..., Any]) -> str:
    """Its file's contents, if there is one: a run does not go on with another function's lines.

    name: MODULE:FUNCTION. The module's file counts, too, where it is another, or where what is
    called has none to show (a partial, a cached function, an object). What these import does not.
    """
    try:
        own = inspect.getsourcefile(function)
    except TypeError:
        own = None
    module = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    files = dict.fromkeys(
        os.path.realpath(file) for file in (own, module) if file is not None
    )  # fmt: skip
    return " ".join(fingerprint(file) for file in files if os.path.isfile(file))
