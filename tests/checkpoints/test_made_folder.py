"""Folders of the cache: whole or not there, made by one of several processes."""

import signal
import subprocess
import sys
import time

import pytest

from guided_decode.checkpoints.made_folder import CACHE_VARIABLE, cache_folder, made_folder
from tests import PATIENCE, ROOT

# Makes the folder in two files, with a wait between them, and says when it has begun.
_SLOW = """
import sys, time
from pathlib import Path
from guided_decode.checkpoints.made_folder import made_folder

def make(folder):
    print("making", flush=True)
    (folder / "first").write_text("1")
    time.sleep(float(sys.argv[1]))
    (folder / "second").write_text("2")

print(sorted(each.name for each in made_folder("thing-1", make).iterdir()))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def slow_maker(seconds):
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def write_word(folder):
    (folder / "word").write_text("whole")


def never(folder):
    raise AssertionError("it was made before")


def test_it_is_made_once(cache):
    made = made_folder("thing-1", write_word)
    assert made == cache / "thing-1"
    assert (made / "word").read_text() == "whole"
    assert made_folder("thing-1", never) == made


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "guided-decode"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "guided-decode"


def test_of_two_processes_one_makes_it_and_the_other_waits():
    both = [slow_maker(2), slow_maker(2)]
    said = [each.communicate(timeout=PATIENCE)[0].splitlines() for each in both]
    assert [lines[-1] for lines in said] == ["['first', 'second']"] * 2
    assert sum(lines.count("making") for lines in said) == 1


def test_one_that_is_killed_leaves_nothing_that_is_taken_for_whole(cache):
    killed = slow_maker(3600)
    assert killed.stdout.readline() == "making\n"
    deadline = time.monotonic() + PATIENCE
    while not list(cache.glob(".thing-1-*/first")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (cache / "thing-1").exists()
    made = made_folder("thing-1", write_word)
    assert [each.name for each in made.iterdir()] == ["word"]
    assert [each.name for each in cache.iterdir() if each.is_dir()] == ["thing-1"]


def test_a_maker_that_fails_leaves_nothing(cache):
    def fail(folder):
        write_word(folder)
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        made_folder("thing-1", fail)
    assert [each for each in cache.iterdir() if each.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"file/thing-1 cannot be written .*set GUIDED_DECODE_CAC"):
        made_folder("thing-1", write_word)
