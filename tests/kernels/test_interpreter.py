"""The kernels' own tests once more, in Triton's interpreter, which must be chosen before import."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests import ROOT
from tests.kernels.kernel_cases import INTERPRETED

FILES = [
    # Its plain path is tried by every guided step of the other tests.
    pytest.param(path, marks=pytest.mark.slow) if path.stem == "test_top_candidates" else path
    for path in sorted(set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)})
]


# One kernel a test. Its limit ends a hang: the work is bounded, how fast a machine is is not.
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    Version(version("numpy")) >= Version("2.4") and Version(version("triton")) < Version("3.7"),
    reason="needs numpy below 2.4, or Triton 3.7: older interpreters read 1-d arrays as numbers",
)
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_hold_in_the_interpreter(file):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:xdist",
            "-m",
            "gpu and not slow",
            "-rf",
            "--timeout",
            "3600",
            str(file),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout


def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, guided_decode.kernels; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
