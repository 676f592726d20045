"""Errors of the package in the words of the command line: `--top-k 0` for `top_k=None`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CALL = re.compile(r"load_scorer\([^()]*?\b(\w+=)\.\.\.\)")
_ARGUMENT = re.compile(
    r"(?<![\w.(-])(?P<name>[a-z_]+)="
    r"(?:'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\"|\.\.\.|(?P<bare>[\w.+-]*\w))?"
)
# What no one types: the value that the flag takes for it.
_TYPED = {("top_k", "None"): "0"}


def flags_of(command: Any) -> dict[str, str]:
    """The long flag of each of a command's parameters, by Python's name of it.

    Where a command has only `--scorer-dtype`, that is what `dtype` says of a scorer.
    """
    flags = {
        param.name: opt for param in command.params for opt in param.opts if opt.startswith("--")
    }
    of_scorers = {
        name.removeprefix("scorer_"): flag
        for name, flag in flags.items()
        if name.startswith("scorer_")
    }
    return of_scorers | flags


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message with each argument that has a flag as it is typed; others stay as they are."""

    def typed(found: re.Match[str]) -> str:
        flag = flags.get(found["name"])
        value = next((one for one in found.group("single", "double", "bare") if one), None)
        value = _TYPED.get((found["name"], value or ""), value)
        if flag is None or value in ("None", "False"):
            return found[0]
        return flag if value in (None, "True") else f"{flag} {value}"

    return _ARGUMENT.sub(typed, _CALL.sub(r"\1", message))
