"""Commands whose options come in groups: a dataclass parameter stands for its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: one option for each field of its dataclass parameters.

    The options stand where the group stood; their annotations and defaults are the fields'.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            own = _options(kind)
            groups[parameter.name] = (kind, [option.name for option in own])
            parameters += own
        else:
            parameters.append(_keyword(parameter.name, parameter.default, kind))

    @wraps(command)
    def of_single_options(**given: Any) -> None:
        made = {
            name: group(**{option: given.pop(option) for option in options})
            for name, (group, options) in groups.items()
        }
        command(**given, **made)

    of_single_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    of_single_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return of_single_options


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_keyword(field.name, field.default, hints[field.name]) for field in fields(group)]


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
