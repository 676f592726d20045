"""The folder of finished units, and what works units off."""

import json
import os
import subprocess
import sys
import threading

import pytest

from guided_decode.lab.ablate.runner import Abandoned, work_off
from guided_decode.lab.ablate.store import FolderInUse, Store, write_whole
from tests import PATIENCE


def test_what_was_put_is_got(tmp_path):
    with Store(tmp_path / "out") as store:
        assert store.get("units", "a") is None
        store.put("units", "a", {"answers": ["é", 1.5, None]})
        assert store.get("units", "a") == {"answers": ["é", 1.5, None], "key": "a"}
        assert store.has("units", "a")
        assert not store.has("rewards", "a")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"key": "b"}'])
def test_a_damaged_file_is_none(tmp_path, text):
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "a.json").write_text(text)
    assert Store(tmp_path).get("units", "a") is None


def test_a_number_that_json_has_not_is_not_put(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path).put("units", "a", {"kl": float("nan")})
    assert not list(tmp_path.glob("**/*"))


def test_what_others_keep_in_the_folder_stays(tmp_path):
    kept = ["notes.tmp", "mine.1.tmp", "mine/units/a.json.7.guided-decode-tmp",
            "units/a.guided-decode-tmp"]  # fmt: skip
    halves = ["a.json.7.guided-decode-tmp", "units/a.json.7.guided-decode-tmp"]
    for name in (*kept, *halves):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with Store(tmp_path, ("units",)):
        assert [name for name in kept if not (tmp_path / name).exists()] == []
        assert [name for name in halves if (tmp_path / name).exists()] == []


def test_two_have_it_one_after_the_other(tmp_path):
    busy = pytest.raises(FolderInUse, match="is being written by another process")
    with Store(tmp_path), busy:
        Store(tmp_path).__enter__()
    with Store(tmp_path):
        pass


def test_the_lock_goes_with_the_process(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from guided_decode.lab.ablate.store import Store\n"
        "Store(Path(sys.argv[1])).__enter__()\nprint('held', flush=True)\ntime.sleep(10000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderInUse):
        Store(tmp_path).__enter__()
    process.kill()
    process.communicate(timeout=PATIENCE)
    with Store(tmp_path):
        pass


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"first")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


def test_so_many_are_under_way_at_once():
    together, done = threading.Barrier(3), {}

    def work(number):
        # Nobody goes on before three have come.
        together.wait(PATIENCE)
        return number**2

    work_off(range(9), work, done.__setitem__, at_once=3)
    assert done == {number: number**2 for number in range(9)}


@pytest.mark.parametrize("at_once", [1, 3])
def test_after_a_failure_none_is_begun_and_those_under_way_are_kept(at_once):
    begun, done = [], {}
    failed = threading.Event()

    def work(number):
        begun.append(number)
        if number == 4:
            failed.set()
            raise ValueError("four")
        if at_once > 1 and number > 4:
            failed.wait(PATIENCE)
        return json.dumps(number)

    with pytest.raises(ValueError, match="four"):
        work_off(range(100), work, done.__setitem__, at_once=at_once)
    assert len(begun) < 10
    assert sorted(done) == sorted(set(begun) - {4})


def interrupt(number, made):
    raise KeyboardInterrupt


def test_after_an_interrupt_those_under_way_are_kept_and_counted():
    release, told, done = threading.Event(), [], []

    def work(number):
        if number:
            assert release.wait(PATIENCE)

    def kept(number, made):
        if number == 0:
            release.set()
            raise KeyboardInterrupt
        done.append(number)

    with pytest.raises(KeyboardInterrupt) as raised:
        work_off(range(9), work, kept, at_once=3, waiting_for=told.append)
    assert not isinstance(raised.value, Abandoned)
    assert (told, sorted(done)) == ([2], [1, 2])


def test_after_a_second_interrupt_nobody_waits_for_those_under_way():
    release, told = threading.Event(), []

    def work(number):
        if number == 2:
            assert release.wait(PATIENCE)

    try:
        with pytest.raises(Abandoned):
            work_off(range(9), work, interrupt, at_once=3, waiting_for=told.append)
    finally:
        release.set()
    assert told == [2]
