"""Holding a release against a surface, without running it: what differs, what the command says."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from guided_decode.integrations.host_surface import Name, Surface, called, overridden
from scripts import host_surface
from scripts.static_names import Sources
from scripts.surface_check import compare
from tests import ROOT

ENGINE = {
    "__init__.py": """
        raise RuntimeError("this must not be run")
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from .runner import Runner as Runner
            from .parts import *
        from torch import Tensor
        from . import runner
        """,
    "parts/__init__.py": "from .wheel import *\nfrom .. import parts\nfrom engine import *",
    "parts/wheel.py": "class Wheel:\n    spokes: int",
    "base.py": """
        import torch
        class Base(torch.nn.Module):
            def __init__(self, size):
                self.size = size
            def start(self, key, *, slow=False, **others): ...
            @staticmethod
            def stop(now): ...
        """,
    "runner.py": """
        from .base import Base
        class Runner(Base):
            rows: list
            @property
            def rank(self): ...
            def apply(self, logits, context): ...
            def add(self, slot, params, extra=None): ...
            def mark(self, cache):
                cache._is_ours = True
        def update(rows, change, new): ...
        """,
}


@pytest.fixture
def engine(tmp_path):
    """An unpacked package whose sources cannot be run."""
    for file, code in ENGINE.items():
        path = tmp_path / "unpacked" / "engine" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))
    return tmp_path / "unpacked"


def surface_of(*names: Name) -> Surface:
    return Surface("engine", ("engine",), "1.0", (), names)


def differences(folder: Path, *names: Name, version: str | None = None) -> list[str]:
    comparison = compare(surface_of(*names), Sources(folder, "engine"), version)
    assert comparison.holds == all(d.is_optional for d in comparison.differences)
    assert comparison.held == comparison.names - len(comparison.differences)
    return [str(difference) for difference in comparison.differences]


@pytest.mark.parametrize(
    "name",
    [
        Name("engine.runner", "ours.py"),
        Name("engine.Runner", "ours.py", has=("rows", "rank", "size")),
        Name("engine.Runner", "ours.py", has=("cache|rows",), may_have=("rank",)),
        Name("engine.parts.Wheel", "ours.py", has=("spokes",)),
        Name("engine.Wheel", "ours.py"),
        Name("engine.Tensor", "ours.py", has=("shape",), takes=called("data")),
        Name("engine.Runner.start", "ours.py", takes=called("key", by_name=("slow",))),
        Name("engine.Runner.start", "ours.py", takes=called("key", any_name=True)),
        Name("engine.Runner.stop", "ours.py", takes=called("now")),
        Name("engine.Runner.apply", "ours.py", takes=overridden("logits", "context")),
        Name("engine.Runner.apply", "ours.py", takes=called("logits", by_name=("ctx|context",))),
        Name("engine.Runner.add", "ours.py", takes=called("slot", "params")),
        Name("engine.Runner.mark", "ours.py", may_set=("_is_ours",)),
        Name("engine.runner.update", "ours.py", takes=called("rows", "change", "new")),
    ],
    ids=lambda name: name.path,
)
def test_what_is_as_it_was_read_is_no_difference(engine, name):
    assert differences(engine, name) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (Name("engine.Walker", "ours.py", why="walks"),
         "engine.Walker is not there (ours.py: walks)"),
        (Name("engine.walkers.Walker", "ours.py"), "engine.walkers.Walker is not there (ours.py)"),
        (Name("engine.Runner", "ours.py", has=("columns",)),
         "engine.Runner.columns is not there (ours.py)"),
        (Name("engine.Runner", "ours.py", has=("apply",)),
         "engine.Runner.apply is called, (logits, context), not read (ours.py)"),
        (Name("engine.Runner.rank", "ours.py", takes=called()),
         "engine.Runner.rank takes no arguments, being of kind attribute, not () (ours.py)"),
        # A parameter that is gone, renamed, out of order, new and required, or new where the
        # engine calls ours.
        (Name("engine.Runner.apply", "ours.py", takes=called("logits", "context", "step")),
         "engine.Runner.apply takes (logits, context), not (logits, context, step) (ours.py)"),
        (Name("engine.Runner.apply", "ours.py", takes=overridden("logits", "ctx")),
         "engine.Runner.apply takes (logits, context), not (logits, ctx) (ours.py)"),
        (Name("engine.runner.update", "ours.py", takes=called("change", "rows", "new")),
         "engine.runner.update takes (rows, change, new), not (change, rows, new) (ours.py)"),
        (Name("engine.Runner.apply", "ours.py", takes=called("logits")),
         "engine.Runner.apply takes (logits, context), not (logits) (ours.py)"),
        (Name("engine.Runner.add", "ours.py", takes=overridden("slot", "params")),
         "engine.Runner.add takes (slot, params, extra=…), not (slot, params) (ours.py)"),
        (Name("engine.Runner.start", "ours.py", takes=called("key", "slow")),
         "engine.Runner.start takes (key, slow=…, **others), not (key, slow) (ours.py)"),
        (Name("engine.Runner.add", "ours.py", takes=called("slot", "params", any_name=True)),
         "engine.Runner.add takes (slot, params, extra=…), not (slot, params, **) (ours.py)"),
        (Name("engine.Runner", "ours.py", may_have=("columns",)),
         "optional: engine.Runner.columns is not there (ours.py)"),
        (Name("engine.Runner.mark", "ours.py", may_set=("_is_theirs",)),
         "optional: engine.Runner.mark -> _is_theirs is not set (ours.py)"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_read_is_a_difference(engine, name, expected):
    assert differences(engine, name) == [expected]


def test_a_name_that_came_late_is_expected_from_then_on(engine):
    late = Name("engine.Walker", "ours.py", since="1.2.0")
    assert differences(engine, late, version="1.1.9") == []
    for version in ("1.2.0", "1.10.0"):
        assert len(differences(engine, late, version=version)) == 1
    assert len(differences(engine, late)) == 1


HOLDS = Name("engine.Runner", "ours.py", has=("rows",), may_have=("columns",))
BREAKS = Name("engine.Walker", "ours.py")


@pytest.fixture
def wheel(engine):
    """The package as a wheel."""
    path = engine.parent / "engine-1.5-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in engine.rglob("*.py"):
            archive.write(file, file.relative_to(engine))
        archive.writestr("engine/kernel.so", "")
        info = "engine-1.5.dist-info"
        metadata = "Metadata-Version: 2.1\nName: engine\nVersion: 1.5\nRequires-Dist: vast\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command on a made-up surface: its exit code, and the lines that it printed."""

    def run(names: tuple[Name, ...], *arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(host_surface, "SURFACES", [surface_of(*names)])
        code = host_surface.main(arguments)
        printed = capsys.readouterr()
        return code, [*printed.out.splitlines(), *printed.err.splitlines()]

    return run


def test_a_wheel_that_holds_ends_with_0(command, wheel):
    assert command((HOLDS,), str(wheel)) == (0, [
        "optional: engine.Runner.columns is not there (ours.py)",
        "engine 1.5: 2 of 3 names as they were read in 1.0",
    ])  # fmt: skip


def test_a_wheel_that_does_not_hold_ends_with_1(command, wheel):
    assert command((HOLDS, BREAKS), str(wheel)) == (1, [
        "optional: engine.Runner.columns is not there (ours.py)",
        "engine.Walker is not there (ours.py)",
        "engine 1.5: 2 of 4 names as they were read in 1.0",
    ])  # fmt: skip


def test_of_a_wheel_only_the_packages_sources_are_unpacked(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(host_surface, "SURFACES", [surface_of(HOLDS)])
    (release,) = host_surface.asked_for(str(wheel), tmp_path)
    unpacked = {path.relative_to(release.folder).as_posix() for path in release.folder.rglob("*.*")}
    assert unpacked == {f"engine/{file}" for file in ENGINE}


def test_an_unpacked_folder_is_read_where_it_lies(command, engine):
    summary = "engine (version unknown): 0 of 1 names as they were read in 1.0"
    for folder in (engine, engine / "engine"):
        code, lines = command((BREAKS,), str(folder))
        assert (code, lines[-1]) == (1, summary)


def test_a_release_is_downloaded_without_its_dependencies(command, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    code, lines = command((HOLDS,), "engine==1.5")
    assert (code, lines[-1]) == (0, "engine 1.5: 2 of 3 names as they were read in 1.0")
    code, lines = command((HOLDS,), "engine==1.6")
    (line,) = lines
    assert code == 2
    assert line.startswith("host_surface: engine==1.6 cannot be downloaded: ERROR: No matching")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("motor==1.0", "host_surface: motor: expected one of engine"),
        ("engine == one", "host_surface: 'engine == one': expected NAME==VERSION, a wheel"),
        ("./motor-1.0-py3-none-any.whl", "host_surface: motor: expected one of engine"),
        ("./engine.whl", "host_surface: engine.whl: expected a wheel (Invalid wheel filename"),
        ("./engine-1.0-py3-none-any.whl",
         "host_surface: engine-1.0-py3-none-any.whl: expected a wheel ([Errno 2]"),
        ("./nowhere", "host_surface: nowhere: expected a folder with an unpacked engine"),
        ("--fast", "host_surface: unrecognized arguments: --fast"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_ends_with_2_and_one_line(command, argument, message):
    code, lines = command((HOLDS,), argument)
    (line,) = lines
    assert code == 2
    assert line.startswith(message)


def test_sources_that_cannot_be_read_end_with_2(command, engine):
    (engine / "engine" / "__init__.py").write_text("class Runner\n")
    code, lines = command((HOLDS,), str(engine))
    (line,) = lines
    assert code == 2
    assert line.startswith("host_surface: engine: its sources cannot be read: ")


def test_nothing_installed_ends_with_2(command):
    assert command((HOLDS,)) == (2, [
        "host_surface: neither vLLM nor transformers is installed: name a release"
    ])  # fmt: skip


def test_without_an_argument_it_judges_what_is_installed():
    command = [sys.executable, "-m", "scripts.host_surface"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "names as they were read in" in ended.stdout
