"""Every block of the README and the documentation: run, or held to what would read it."""

import pytest

from guided_decode.checkpoints.registry import find
from tests.documentation import stand_ins
from tests.documentation.command_checks import CHECKS, check_command, run_command
from tests.documentation.markdown_blocks import (
    NO_LANGUAGE,
    PYTHON,
    SHELLS,
    markdown_files,
    read_blocks,
)
from tests.documentation.outputs import OUTPUTS
from tests.documentation.python_blocks import run_python
from tests.documentation.shell_reading import read_commands

FILES = markdown_files()
BLOCKS = [block for file in FILES for block in read_blocks(file)]


def of(*languages):
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


def test_every_file_of_documentation_is_read():
    assert {"README.md", "CONTRIBUTING.md", "docs/vllm.md", "recipes/ppo/README.md"} <= {*FILES}


@of(PYTHON)
def test_python_runs(block):
    run_python(block)


@of(*SHELLS)
def test_commands_run_or_would_be_read(block, tmp_path):
    commands = read_commands(block, CHECKS, tmp_path)
    assert commands, f"{block} has no command"
    for command in commands:
        (check_command if block.has("needs") else run_command)(command)


def test_a_block_with_requests_is_marked_for_the_server_that_answers_them():
    asks = [block for block in BLOCKS if block.language in SHELLS and "curl" in block.code]
    assert asks == [block for block in BLOCKS if "server" in block.clause("needs")]


@of(NO_LANGUAGE)
def test_what_is_printed_is_what_is_shown(block):
    if block.has("prints"):
        (name,) = block.clause("prints")
        shown, printed = OUTPUTS[name](block.code)
        assert shown == printed


def test_stand_ins_are_of_the_kind_that_they_stand_for():
    critics = [name for name in stand_ins.CHECKPOINTS if find(name) is not None]
    assert critics
    for name in critics:
        hub, embedded = find(name), find(stand_ins.CHECKPOINTS[name])
        assert (hub.architecture, hub.kind) == (embedded.architecture, embedded.kind)
        assert stand_ins.CHECKPOINTS[hub.policy] == embedded.policy
    # The policies, which the registry has as partners only.
    policies = {find(name).policy for name in critics}
    assert {*critics, *policies} == {*stand_ins.CHECKPOINTS}
