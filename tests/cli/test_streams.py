"""Output that cannot be written: one line and exit code 2; 1 and silence for a closed pipe."""

import os
import subprocess
import sys

import pytest

from tests import PATIENCE

RUN = (sys.executable, "-m", "guided_decode.cli")
# Hides that what was printed waits in a buffer.
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
GENERATE = ("generate", "--prompt", "4+4?", "--max-new-tokens", "1")


def run(*args, redirect="", **options):
    """A command in a shell, for its redirections."""
    command = f'"$@" {redirect}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", "bash", *RUN, *args],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False, **options,
    )  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize(
    "args", [("models", "--json"), ("models",), ("models", "--help"), GENERATE], ids=" ".join
)
def test_a_full_disk_is_one_line_and_exit_code_2(args):
    ended = run(*args, redirect="> /dev/full")
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: the output cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("args", [("models", "--json"), ("models",)], ids=" ".join)
def test_a_closed_pipe_is_silence_and_exit_code_1(args):
    ended = run(*args, redirect="| true")
    # The reader may have been too slow to leave.
    assert (ended.returncode, ended.stderr) in [(1, ""), (0, "")]
    reader, writer = os.pipe()
    os.close(reader)
    ended = run(*args, stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.slow
def test_closed_descriptors_are_no_silent_success():
    ended = run("models", "--json", redirect=">&-")
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: the output cannot be written: Bad file descriptor\n",
    )
    ended = run("generate", redirect="<&-")
    assert (ended.returncode, ended.stderr) == (2, "error: stdin holds no prompt: expected text\n")
    # The line has nowhere to go, above all not into the answers.
    ended = run("generate", "--prompt", "", redirect="2>&-", stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (2, "")


def test_text_beyond_the_outputs_encoding_says_so():
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = "from guided_decode.cli import app; "
    command += "import typer; app.app.command()(lambda: print('naïve')); app.app(['<lambda>'])"
    ended = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True,
                           text=True, timeout=PATIENCE, check=False)  # fmt: skip
    assert ended.returncode == 2
    assert "'\\xef' cannot be written in the ascii encoding" in ended.stderr
