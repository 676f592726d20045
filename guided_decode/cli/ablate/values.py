"""Values of YAML as the command line's options take them."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Union, get_args, get_origin

# What a key takes: a type, as options have it.
Hint = Any

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_TEXT_OF_OBJECTS = ("engine_args", "device_map")


def hints_of(*groups: type) -> dict[str, Hint]:
    """What the fields of option groups take, by name."""
    return {
        field.name: hint
        for group in groups
        for field in fields(group)
        for hint in [typing.get_type_hints(group)[field.name]]
    }


def typed(name: str, value: Any, hint: Hint) -> tuple[Any, str]:
    """The value as an option takes it, and what is wrong with it."""
    kinds = _kinds(hint)
    if value is None:
        return None, ""
    if name in _TEXT_OF_OBJECTS and isinstance(value, Mapping):
        # As it is typed on the command line.
        return json.dumps(value), ""
    for kind in kinds:
        if get_origin(kind) is list:
            return _listed(name, value, get_args(kind)[0])
    for kind in kinds:
        fits, taken = _as(kind, value)
        if fits:
            return taken, ""
    expected = " or ".join(_NAMES.get(kind, getattr(kind, "__name__", "?")) for kind in kinds)
    return value, f"{name}: {value!r}: expected {expected}"


def _listed(name: str, value: Any, hint: Hint) -> tuple[Any, str]:
    own = value if isinstance(value, list) else [value]
    pairs = [typed(name, each, hint) for each in own]
    return [each for each, _ in pairs], next((problem for _, problem in pairs if problem), "")


def _kinds(hint: Hint) -> list[Any]:
    origin: Any = get_origin(hint)
    if origin is Annotated:
        return _kinds(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return [kind for one in get_args(hint) for kind in _kinds(one) if kind is not type(None)]
    return [hint]


def _as(kind: Any, value: Any) -> tuple[bool, Any]:
    if kind is bool:
        return isinstance(value, bool), value
    if isinstance(value, bool):
        return False, value
    if kind is int:
        return isinstance(value, int), value
    if kind is float:
        try:
            # YAML 1.1 has 1e-3 as text.
            return isinstance(value, (int, float, str)), float(value)
        except (TypeError, ValueError):
            return False, value
    if kind is str:
        return isinstance(value, (str, int, float)), str(value)
    return isinstance(value, kind), value
