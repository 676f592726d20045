"""The options of `guided-decode serve` that are vLLM's: told apart, handed on, looked up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

_NUMBER = re.compile(r"-\d[\d.]*")


class PassingOn(TyperCommand):
    """A command that leaves every option that is not its own, with its values, in `ctx.args`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the own options; the others are left as they were typed."""
        flags = {opt: param.is_flag for param in self.get_params(ctx) if hasattr(param, "is_flag")
                 for opt in (*param.opts, *param.secondary_opts)}  # fmt: skip
        own, others = _told_apart(args, flags)
        super().parse_args(ctx, own)
        ctx.args = others
        return others


def _told_apart(args: Sequence[str], flags: dict[str, bool]) -> tuple[list[str], list[str]]:
    """(own, others). flags: whether an own option is a flag, which takes no value."""
    own: list[str] = []
    others: list[str] = []
    rest = list(args)
    while rest:
        token = rest.pop(0)
        name, joined, _ = token.partition("=")
        if token == "--":
            return own, [*others, *rest]
        if name in flags:
            own.append(token)
            if not joined and not flags[name]:
                own += rest[:1]
                del rest[:1]
        elif token.startswith("-") or others:
            # What has no dash is the value of the option before it.
            others.append(token)
        else:
            own.append(token)
    return own, others


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    tokens: list[str]
    values: list[str]


class VllmOptions:
    """vLLM's options as they were typed; `--a_b c`, `--a-b=c` and `--a-b c` are one."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._options: list[_Option] = []
        for token in tokens:
            if token.startswith("-") and not _NUMBER.fullmatch(token):
                name, joined, value = token.partition("=")
                self._options.append(_Option(_spelt(name), [token], [value] if joined else []))
            elif self._options:
                self._options[-1].tokens.append(token)
                self._options[-1].values.append(token)
            else:
                self._options.append(_Option("", [token], [token]))

    @property
    def tokens(self) -> list[str]:
        """All of them, to be handed on."""
        return [token for option in self._options for token in option.tokens]

    @property
    def names(self) -> list[str]:
        """The names, with dashes; `--a.b` for one key of a JSON option."""
        return [option.name for option in self._options]

    def has(self, *names: str) -> bool:
        """Whether one of these was given."""
        return any(option.name in names for option in self._options)

    def values(self, *names: str) -> list[str]:
        """The values of the last of these; [] where none was given."""
        found = [option.values for option in self._options if option.name in names]
        return found[-1] if found else []

    def take(self, *names: str) -> list[str]:
        """The values of the last of these, which are then not handed on."""
        values = self.values(*names)
        self._options = [option for option in self._options if option.name not in names]
        return values


def _spelt(name: str) -> str:
    option, dot, key = name.partition(".")
    return option.replace("_", "-") + dot + key
