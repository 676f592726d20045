"""The wheel and the source distribution, each in a new environment, as a user gets them."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git, which lists the files"),
]

USER_SCRIPT = """\
import torch

from guided_decode import GuidanceConfig, PrefixHandle, Scorer, Scores, guide, load_scorer
from guided_decode.integrations.transformers import GuidedDecoding


def advise(scorer: Scorer, prefix: list[int]) -> Scores:
    return scorer.score([PrefixHandle(prefix)], torch.tensor([[5, 6]]))


config = GuidanceConfig(beta=2.0, top_k=8)
critic: Scorer = load_scorer("tiny-tulu-value")
values, baseline = advise(critic, [5, 6, 7])
logits = guide(torch.zeros(1, 600), torch.tensor([[5, 6]]), Scores(values, baseline), config)
loop = GuidedDecoding(critic, config)
print(tuple(logits.shape), logits[0, 5] != 0)
"""


def run(*command: object, cwd: Path) -> str:
    ended = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-6000:]}{ended.stderr[-6000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """{"wheel", "sdist"}: the files, of what git knows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    build = "from setuptools import build_meta as b; b.build_{}({!r})"
    for kind in ("wheel", "sdist"):
        run(sys.executable, "-c", build.format(kind, str(out)), cwd=source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(params=["wheel", "sdist"])
def environment(distributions, tmp_path, request):
    """Folder of a new environment's programs, which has the distribution and this one's others."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    others = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(others.strip()) / "others.pth").write_text(sysconfig.get_path("purelib"))
    # An older one than the build needs, where Python brings any.
    run(python, "-m", "pip", "uninstall", "-q", "--yes", "setuptools", cwd=folder)
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")
    run(python, *install, distributions[request.param], cwd=folder)
    return folder / "bin"


def test_it_imports_has_its_command_and_its_types(environment, tmp_path):
    python = environment / "python"
    where = run(python, "-c", "import guided_decode; print(guided_decode.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)
    assert "tiny-tulu-value" in run(environment / "guided-decode", "models", cwd=tmp_path)
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    assert run(python, "user.py", cwd=tmp_path) == "(1, 600) tensor(True)\n"
    checked = run(python, "-m", "mypy", "--strict", "user.py", cwd=tmp_path)
    assert "Success: no issues found in 1 source file" in checked


def test_the_source_distribution_has_its_tests_and_what_they_need(distributions, tmp_path):
    with tarfile.open(distributions["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    known = set(filter(None, run("git", "ls-files", "-z", cwd=ROOT).split("\0")))
    packed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    # What continuous integration alone reads stays behind.
    assert {name for name in known - packed if not name.startswith(".ci/")} == set()
    tests = ("tests/guidance", "tests/test_packaging.py", "tests/test_layers.py")
    ended = run(sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *tests, cwd=folder)
    assert " passed" in ended
    run("make", "--dry-run", "test", "demo", cwd=folder)
