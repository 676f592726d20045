"""What a shell makes of a block: the shell is real, the programs that it finds note their words."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests import PATIENCE
from tests.documentation.markdown_blocks import Block

# What blocks use of the system itself.
_REAL = ("mktemp",)
_NOTE = """
import json, os, sys
with open(os.environ["COMMANDS"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[1]), sys.argv[2:], dict(os.environ)]), file=file)
"""


@dataclass(frozen=True)
class Command:
    """A command as a shell would start it: its name, its words, and its environment."""

    program: str
    words: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        return shlex.join([self.program, *self.words])


def read_commands(block: Block, programs: Iterable[str], folder: Path) -> list[Command]:
    """The commands of a block, in order; quotes, variables and functions are the shell's to read.

    programs: those that may come; another is an error of the shell. folder: an empty one.
    """
    path = folder / "path"
    path.mkdir()
    for program in programs:
        note = path / program
        note.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS -c "
                        f'{shlex.quote(_NOTE)} "$0" "$@"\n')  # fmt: skip
        note.chmod(0o755)
    for program in _REAL:
        (path / program).symlink_to(_found(program))
    # Programs are also called by their place in the checkout's virtual environment.
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(path)
    notes = folder / "commands"
    notes.touch()
    own = {"PATH": str(path), "TMPDIR": str(folder), "COMMANDS": str(notes)}
    ended = subprocess.run(
        [_found(block.language), "-e", "-c", block.code],
        cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, f"{block}: {ended.stderr}"
    return [
        Command(program, tuple(words), environment | {"PATH": os.environ["PATH"]})
        for program, words, environment in map(json.loads, notes.read_text().splitlines())
    ]


def _found(program: str) -> str:
    found = shutil.which(program)
    assert found is not None, f"{program} is not on the path"
    return found
