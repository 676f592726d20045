"""docs/vllm.md's table of what combines with guidance: a test that there is holds each cell."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT

_HEADING = "## What combines with what"
_VLLM = ROOT / "tests" / "integrations" / "vllm"
_ON_V2 = _VLLM / "test_runner_v2.py"
# What starts an engine, which runs on V1 unless V2's own process runs the file.
_ENGINES = ("vllm_parts.engine(", "servers.started(")


class Row(NamedTuple):
    """what, v1, v2: its cells. held: the names of tests, by runner."""

    what: str
    v1: str
    v2: str
    held: dict[str, list[str]]


def held_by(cell: str) -> dict[str, list[str]]:
    """Names of tests for each runner; a part without a runner is for both."""
    held: dict[str, list[str]] = {"V1": [], "V2": []}
    for part in cell.split(";"):
        runner = re.match(r"\s*(V[12]): ", part)
        names = re.findall(r"`(test_\w+)`", part)
        assert names, f"no test in {part!r}"
        for each in (runner.group(1),) if runner else ("V1", "V2"):
            held[each] += names
    return held


def read_rows() -> list[Row]:
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8").split(_HEADING + "\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == ["", "V1 runner", "Model Runner V2", "held by"]
    assert all(len(each) == 4 for each in cells), cells
    return [Row(*each[:3], held_by(each[3])) for each in cells[2:]]


ROWS = read_rows()


@cache
def files_of_tests() -> dict[str, list[str]]:
    """Every test function under tests/, and the files that have one of its name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(str(path))
    return found


@cache
def is_for_v2(file: str) -> bool:
    """Whether V2's own process runs the file, or no runner has a part in it."""
    name = file.rpartition("/")[2].removesuffix(".py")
    text = Path(file).read_text(encoding="utf-8")
    run_there = re.findall(r"\btest_\w+", _ON_V2.read_text(encoding="utf-8"))
    runs_itself = "def test_on_v2(" in text
    starts_engines = any(each in text for each in _ENGINES)
    return runs_itself or name in (*run_there, _ON_V2.stem) or not starts_engines


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_each_cell_is_held_by_tests_that_there_are(row):
    for runner, cell in (("V1", row.v1), ("V2", row.v2)):
        assert cell
        assert row.held[runner], f"no test holds {row.what!r} on {runner}"
        for name in row.held[runner]:
            files = files_of_tests().get(name, [])
            assert files, f"{row.what}: there is no test of the name {name}"
            if runner == "V2":
                assert any(map(is_for_v2, files)), f"{row.what}: {name} does not run on V2"


def test_a_row_that_nobody_holds_is_seen():
    with pytest.raises(AssertionError, match="no test in"):
        held_by("as ever")
    assert held_by("`test_a`; V2: `test_b`, `test_c`") == {
        "V1": ["test_a"], "V2": ["test_a", "test_b", "test_c"]
    }  # fmt: skip
    assert not is_for_v2(str(_VLLM / "test_server.py"))
    assert is_for_v2(str(_VLLM / "test_engine.py"))
    assert is_for_v2(str(_VLLM / "test_request.py"))
