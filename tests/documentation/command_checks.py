"""The commands of the documentation: run, or held to what would read their words."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner

from guided_decode.cli.app import app
from tests import PATIENCE, ROOT
from tests.documentation import vllm_checks
from tests.documentation.shell_reading import Command
from tests.documentation.stand_ins import WORDS

_REQUIREMENT = re.compile(r"(?:\.|guided-decode)(?:\[(?P<extras>[\w,-]+)\])?")
# How the package may be installed: editable, which in strict mode editors can follow.
_PIP_OPTIONS = ("-e", "--editable", "--config-settings", "editable_mode=strict")
# Where the Makefile puts programs.
VENV = ".venv/bin/"
OPTION = re.compile(r"--[a-z][\w-]*")
# Commands that end by themselves within seconds.
_RUN = ("generate", "models", "plan", "search", "trace")
# What one writes to a file of its own choice.
_UNWRITTEN = {"trace": ("--output", os.devnull)}


def run_command(command: Command) -> None:
    """Runs a command of a block that needs nothing."""
    words = command.words
    is_run = command.program == "guided-decode" and set(words[:1]) & set(_RUN)
    assert is_run, f"{command} is not run here: mark its block with what it needs"
    words += _UNWRITTEN.get(words[0], ())
    result = CliRunner().invoke(app, words, env=command.environment)
    assert result.exit_code == 0, f"{command}: {result.output}"


def check_command(command: Command) -> None:
    """Holds a command that is not run to what would read its words."""
    CHECKS[command.program](command)


def commands_of(application: typer.Typer) -> dict[str, Any]:
    """The commands of an application, by name."""
    return typer.main.get_command(application).commands


def guided_decode_options(name: str) -> set[str]:
    """The options of a command of ours; for `serve` with those that it hands on to vLLM."""
    commands = commands_of(app)
    assert name in commands, f"guided-decode {name}: expected one of {', '.join(commands)}"
    own = {option for parameter in commands[name].params for option in parameter.opts}
    return own | (vllm_checks.options() if name == "serve" else set()) | {"--help"}


def module_options(module: str) -> set[str]:
    """The options that a module's own help lists."""
    return set(OPTION.findall(_parsed(module, ("--help",))))


def _check_guided_decode(command: Command) -> None:
    name, *words = (WORDS.get(word, word) for word in command.words)
    if name == "serve":
        vllm_checks.check_launch(_dry_run(tuple(words)))
        return
    guided_decode_options(name)
    # Parses and converts; runs nothing.
    commands_of(app)[name].make_context(name, words)


def _dry_run(words: tuple[str, ...]) -> Command:
    """What `guided-decode serve` would start."""
    vllm_checks.require()
    result = CliRunner().invoke(app, ["serve", *words, "--dry-run"])
    assert result.exit_code == 0, f"guided-decode serve {shlex.join(words)}: {result.output}"
    parts = shlex.split(result.stdout)
    start = next(i for i, part in enumerate(parts) if "=" not in part)
    environment = dict(part.split("=", 1) for part in parts[:start])
    program, *rest = parts[start:]
    assert program == sys.executable
    return Command("python", tuple(rest), environment)


def _check_make(command: Command) -> None:
    ended = subprocess.run(
        ["make", "--dry-run", *command.words],
        cwd=ROOT, env=command.environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, f"{command}: {ended.stderr}"


def _check_pip(command: Command) -> None:
    action, *words = command.words
    if action == "uninstall":
        removed = (ROOT / "scripts" / "setup_env.sh").read_text()
        assert f"pip uninstall --yes {' '.join(words)}\n" in removed, command
        return
    assert action == "install", command
    if words[:1] == ["--no-deps"]:
        # What the development set-up installs so, at the version that it has.
        pins = (ROOT / "constraints.txt").read_text()
        assert all(f"\n{word}==" in pins for word in words[1:]), command
        return
    requirements = [word for word in words if word not in _PIP_OPTIONS]
    assert len(requirements) == 1, command
    found = _REQUIREMENT.fullmatch(requirements[0])
    assert found is not None, f"{command}: expected this package, with extras of its own"
    check_extras(found["extras"] or "")


def check_extras(names: str) -> None:
    """Extras, with commas between them, are the package's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unknown = set(filter(None, names.split(","))) - set(project["optional-dependencies"])
    assert not unknown, f"pyproject.toml has no extra {', '.join(unknown)}"


def _check_module(command: Command) -> None:
    flag, module, *words = command.words
    assert flag == "-m", command
    if module.startswith("vllm."):
        vllm_checks.check_launch(command)
        return
    if module.endswith(".lm_eval") and find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    for variant in _with_and_without_brackets(words):
        _parsed(module, variant)


def _check_torchrun(command: Command) -> None:
    flag, processes, *words = command.words
    assert flag == "--nproc-per-node", command
    assert processes.isdigit(), command
    if words[0] != "-m":
        assert words[0].endswith(".py"), command
        return
    assert words[1] == "guided_decode", command
    _check_guided_decode(Command("guided-decode", tuple(words[2:]), command.environment))


def _with_and_without_brackets(words: list[str]) -> list[tuple[str, ...]]:
    """The words with all that stands in [--option VALUE], and with none of it."""
    every, needed, optional = [], [], False
    for word in words:
        optional = optional or word.startswith("[")
        every.append(word.removeprefix("[").removesuffix("]") if optional else word)
        needed += [] if optional else [word]
        optional = optional and not word.endswith("]")
    return list(dict.fromkeys([tuple(every), tuple(needed)]))


def _parsed(module: str, words: tuple[str, ...]) -> str:
    """What a module's own reading of its words prints; of itself it starts nothing."""
    assert find_spec(module) is not None, f"python -m {module}: no such module"
    main = module if find_spec(f"{module}.__main__") is None else f"{module}.__main__"
    parse = importlib.import_module(main).parse_arguments
    output, status = StringIO(), None
    with mock.patch.object(sys, "argv", [module, *words]), redirect_stdout(output):
        try:
            with redirect_stderr(output):
                parse()
        except SystemExit as end:
            status = end.code
    assert not status, f"python -m {module} {shlex.join(words)}: {output.getvalue()[-300:]}"
    return output.getvalue()


def _check_vllm(command: Command) -> None:
    assert command.words[:1] == ("serve",), command
    vllm_checks.check_launch(command)


def _check_curl(command: Command) -> None:
    vllm_checks.check_request(command, _dry_run(()))


CHECKS: dict[str, Callable[[Command], None]] = {
    "guided-decode": _check_guided_decode,
    "make": _check_make,
    "pip": _check_pip,
    "python": _check_module,
    "torchrun": _check_torchrun,
    "vllm": _check_vllm,
    "curl": _check_curl,
}


def check_by_name(words: list[str]) -> None:
    """What inline code names is there: a command, a target or a module, and its options."""
    environment = dict(os.environ)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *rest = words
    program = program.removeprefix(VENV)
    if program not in CHECKS:
        project = (ROOT / "pyproject.toml").read_text()
        assert f'"{program}>=' in project, f"no extra brings {program}"
    elif program == "guided-decode":
        _options_are_known(rest, guided_decode_options(rest[0]))
    elif program == "python" and not rest[1].startswith("vllm."):
        assert rest[0] == "-m", words
        assert find_spec(rest[1]) is not None, f"{shlex.join(words)}: no such module"
        if any(map(OPTION.fullmatch, rest)):
            _options_are_known(rest, module_options(rest[1]))
    else:
        check_command(Command(program, tuple(rest), environment))


def _options_are_known(words: list[str], known: set[str]) -> None:
    unknown = {word for word in words if OPTION.fullmatch(word)} - known
    assert not unknown, f"{shlex.join(words)}: no option {', '.join(unknown)}"
