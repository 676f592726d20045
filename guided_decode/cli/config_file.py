"""Files that `--config` takes: settings of commands by section, each with its line.

YAML, or JSON, which is YAML:

    models:                  # of every command
      policy: tiny-tulu-sft
      scorer: tiny-tulu-value
    guidance:                # of the commands that guide tokens
      beta: 9.3
      top_k: 4
    generate:                # of this command alone, by the names of its options
      max_new_tokens: 100
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.jsonl import place, read_text

MODELS, GUIDANCE = "models", "guidance"
COMMANDS = ("generate", "search", "serve", "trace")
SECTIONS = (MODELS, GUIDANCE, *COMMANDS)

# YAML takes no tab for a space.
_TABS = re.compile(r"^\t+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Setting:
    """A value with the number of its line."""

    value: Any
    line: int


Section = Mapping[str, Setting]
# What is wrong, and in which line.
Problems = list[tuple[int, str]]


def read_config(file: Path) -> tuple[dict[str, Section], Problems]:
    """The settings of a file, by section, and what is wrong with it.

    Raises:
        Refusal: it is no YAML, or no sections at all.
        OSError: it cannot be read.
    """
    problems: Problems = []
    sections: dict[str, Section] = {}
    for name, node, line in _items(_parsed(file), problems):
        if name not in SECTIONS:
            problems.append((line, unknown(name, SECTIONS, "section")))
        elif _kind(node) == "null":
            sections[name] = {}
        elif _kind(node) != "map":
            problems.append((line, f"{name}: expected settings below it"))
        else:
            items = _items(node, problems)
            sections[name] = {key: Setting(_value(below), at) for key, below, at in items}
    return sections, problems


def is_config(file: Path) -> bool:
    """Whether a file is one of these; vLLM's own option of that name takes other files."""
    try:
        node = _parsed(file)
    except (Refusal, OSError):
        # Who reads it says what is wrong.
        return True
    names = {key.value for key, _ in node.value} if _kind(node) == "map" else set()
    return bool(names & set(SECTIONS)) or not names


def unknown(name: str, known: Any, what: str) -> str:
    """What is said of a name that there is not."""
    choices = list(known)
    close = difflib.get_close_matches(name.replace("-", "_"), choices, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{name}: no such {what}{hint}; expected one of {', '.join(choices)}"


def refuse(file: Path, problems: Problems) -> None:
    """Raises Refusal with all of them, by line, where there are any."""
    if problems:
        raise Refusal("; ".join(f"{place(file, line)}: {said}" for line, said in sorted(problems)))


def _parsed(file: Path) -> Any:
    """The file's mapping as YAML's nodes, which know their lines."""
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
        raise Refusal(f"{file}: nested too deeply: expected sections of settings") from None
    if node is None or _kind(node) != "map":
        raise Refusal(f"{file}: expected sections of settings, of {', '.join(SECTIONS)}")
    return node


def _items(node: Any, problems: Problems) -> Iterator[tuple[str, Any, int]]:
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


def _kind(node: Any) -> str:
    """ "map", "seq", "str", "int", "float", "bool" or "null"."""
    return str(node.tag).rpartition(":")[2]


def _value(node: Any) -> Any:
    import yaml

    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
