"""The house: every module has its wing, and `make lint` refuses an import against the layers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PATIENCE, ROOT

LINTED = ("guided_decode", "kernels", "integrations", "recipes", "benchmarks", "scripts")
MOST_FILES_AT_THE_ROOT = 8


@pytest.fixture
def copy(tmp_path):
    """The checkout's sources, to be changed."""
    for folder in LINTED:
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__", "assets", "results"),
        )
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess:
    """`make lint` with the virtual environment that runs this test."""
    venv = sys.prefix
    make = ["make", "--old-file", f"{venv}/.dev", "--old-file", "dev-env", "lint", f"VENV={venv}"]
    return subprocess.run(make, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def test_the_house_as_it_stands_is_in_order(copy):
    ended = lint(copy)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Contracts: 2 kept, 0 broken" in ended.stdout


# What an unused import would do is ruff's to say.
LATE_IMPORT = '''

def late() -> object:
    """Imports late."""
    from {package} import {name}

    return {name}
'''


@pytest.mark.parametrize(
    ("file", "package", "name", "broken"),
    [
        ("kernels/norm.py", "guided_decode", "growable", "kernels.norm -> guided_decode.growable"),
        ("guided_decode/prefix.py", "guided_decode.cache", "pool", "prefix -> guided_decode.cache"),
        ("guided_decode/cache/pool.py", "guided_decode.forward", "packed", "pool -> guided_decode"),
        (
            "guided_decode/lab/demo/plot.py",
            "guided_decode.integrations",
            "padding",
            "lab.demo.plot",
        ),
        (
            "integrations/transformers/padding.py",
            "guided_decode.cli",
            "app",
            "integrations.transformers.padding",
        ),
        ("guided_decode/cli/models.py", "recipes", "ppo", "cli.models -> recipes.ppo"),
    ],
)
def test_an_import_against_the_layers_is_refused(copy, file, package, name, broken):
    with (copy / file).open("a") as source:
        source.write(LATE_IMPORT.format(package=package, name=name))
    ended = lint(copy)
    assert ended.returncode != 0
    assert "1 broken" in ended.stdout, ended.stdout + ended.stderr
    assert broken in ended.stdout


def test_a_module_without_a_wing_is_refused(copy):
    (copy / "guided_decode" / "lumber_room.py").write_text('"""Odds and ends."""\n')
    ended = lint(copy)
    assert ended.returncode != 0
    assert "lumber_room" in ended.stdout


def test_the_packages_root_is_small():
    files = [path for path in (ROOT / "guided_decode").iterdir() if path.is_file()]
    assert len(files) <= MOST_FILES_AT_THE_ROOT, sorted(path.name for path in files)
