"""What libraries say at their import is not said on the terminal."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["plan", "--help"], ["models"]], ids=" ".join)
def test_nothing_is_said_that_was_not_asked(arguments):
    run = subprocess.run(
        [sys.executable, "-m", "guided_decode.cli", *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert run.stderr == ""
