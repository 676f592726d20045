"""YAML whose values know their lines: JSON, which is YAML, too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.jsonl import place, read_text

# YAML takes no tab for a space.
_TABS = re.compile(r"^\t+", re.MULTILINE)

# What is wrong, and in which line.
Problems = list[tuple[int, str]]


def read_mapping(file: Path, expected: str) -> Any:
    """The file's mapping as YAML's nodes, which know their lines.

    expected: what is asked for where it is none.

    Raises:
        Refusal: it is no YAML, or no mapping.
        OSError: it cannot be read.
    """
    import yaml

    text = read_text(file)
    if file.suffix == ".json":
        text = _TABS.sub(lambda tabs: " " * len(tabs[0]), text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(file) if mark is None else place(file, mark.line + 1)
        problem = getattr(error, "problem", None) or one_line(error)
        raise Refusal(f"{where}: not YAML ({problem})") from error
    except RecursionError:
        raise Refusal(f"{file}: nested too deeply: expected {expected}") from None
    if node is None or kind_of(node) != "map":
        raise Refusal(f"{file}: expected {expected}")
    return node


def items_of(node: Any, problems: Problems) -> Iterator[tuple[str, Any, int]]:
    """Key, value and line of each entry; one that came before is a problem."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name in seen:
            problems.append((line, f"{name} stands in line {seen[name]} already"))
            continue
        seen[name] = line
        yield name, value, line


def kind_of(node: Any) -> str:
    """ "map", "seq", "str", "int", "float", "bool" or "null"."""
    return str(node.tag).rpartition(":")[2]


def value_of(node: Any) -> Any:
    """What a node says, as Python has it."""
    import yaml

    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except ValueError:
        # What looks like a day or a number and is none, such as 2026-13-45, is text.
        return node.value if isinstance(node.value, str) else None
    finally:
        loader.dispose()
