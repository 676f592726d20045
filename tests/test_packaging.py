"""The layout: kernels/ and integrations/ import as parts of guided_decode, and as nothing else."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import guided_decode
from tests import PATIENCE, ROOT

IMPORTS = "import guided_decode.kernels, guided_decode.integrations"
# What a shell in the checkout sees when the package was never installed.
UNINSTALL = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
    "sys.path = [p for p in sys.path if 'editable' not in p]; "
)


def run_python(code: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_mapped_folders_import_from_the_installation(tmp_path):
    code = f"{IMPORTS}; print(guided_decode.kernels.__file__)"
    assert Path(run_python(code, tmp_path)).name == "__init__.py"


def test_mapped_folders_import_from_the_repository_root_without_an_installation():
    code = f"{UNINSTALL}{IMPORTS}; print(guided_decode.kernels.__file__)"
    assert run_python(code, ROOT) == str(ROOT / "kernels" / "__init__.py")


def test_transformers_does_not_take_our_kernels_for_hugging_faces():
    code = (
        f"{IMPORTS}; from transformers.utils.import_utils import is_kernels_available; "
        "print(is_kernels_available())"
    )
    assert run_python(code, ROOT) == "False"


def test_version_is_the_distributions():
    assert metadata.version("guided-decode") == guided_decode.__version__


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = (
        "from setuptools import build_meta; "
        f"build_meta.build_wheel({str(out)!r}, {{'--build-option': ['--quiet']}})"
    )
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        (source / name).write_text((ROOT / name).read_text())
    for folder in ("guided_decode", "kernels", "integrations"):
        (source / folder).symlink_to(ROOT / folder)
    run_python(build, source)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_source_file_and_asset_under_its_installed_name(wheel_names):
    expected = {"guided_decode/py.typed"}
    for folder, prefix in (
        ("guided_decode", ""),
        ("kernels", "guided_decode/"),
        ("integrations", "guided_decode/"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(prefix + path.relative_to(ROOT).as_posix())
    for folder in ("assets", "lab/trace/web"):
        for path in (ROOT / "guided_decode" / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(path.relative_to(ROOT).as_posix())
    assert expected - wheel_names == set()


def test_wheel_claims_one_top_level_name(wheel_names):
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"guided_decode"}


def test_the_embedded_models_are_files_not_links_of_an_editable_install(tmp_path):
    """Who copies a folder of links and writes to the copy would write to the checkout."""
    code = (
        "from guided_decode.tiny_tulu import model_path; "
        "print([p.name for p in model_path('value').iterdir() if p.is_symlink()])"
    )
    assert run_python(code, tmp_path) == "[]"
