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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import place
from guided_decode.cli.yaml_lines import Problems, items_of, kind_of, read_mapping, value_of

MODELS, GUIDANCE = "models", "guidance"
COMMANDS = ("generate", "search", "serve", "trace")
SECTIONS = (MODELS, GUIDANCE, *COMMANDS)
_EXPECTED = f"sections of settings, of {', '.join(SECTIONS)}"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value with the number of its line."""

    value: Any
    line: int


Section = Mapping[str, Setting]


def read_config(file: Path) -> tuple[dict[str, Section], Problems]:
    """The settings of a file, by section, and what is wrong with it.

    Raises:
        Refusal: it is no YAML, or no sections at all.
        OSError: it cannot be read.
    """
    problems: Problems = []
    sections: dict[str, Section] = {}
    for name, node, line in items_of(read_mapping(file, _EXPECTED), problems):
        if name not in SECTIONS:
            problems.append((line, unknown(name, SECTIONS, "section")))
        elif kind_of(node) == "null":
            sections[name] = {}
        elif kind_of(node) != "map":
            problems.append((line, f"{name}: expected settings below it"))
        else:
            items = items_of(node, problems)
            sections[name] = {key: Setting(value_of(below), at) for key, below, at in items}
    return sections, problems


def names_in(file: Path) -> set[str] | None:
    """The names at the top of a file, of whichever program; None where it cannot be read."""
    try:
        node = read_mapping(file, _EXPECTED)
    except (Refusal, OSError):
        return None
    return {key.value for key, _ in node.value} if kind_of(node) == "map" else set()


def is_config(file: Path) -> bool:
    """Whether a file is one of these; vLLM's own option of that name takes other files."""
    names = names_in(file)
    # Who reads it says what is wrong.
    return not names or bool(names & set(SECTIONS))


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
