"""The lock on a file: one holder, gone with it, and not kept by its children."""

import fcntl
import multiprocessing
import os

import pytest

from guided_decode.serving.file_lock import FileLock
from tests import PATIENCE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork is what it is about")


def test_one_has_it_until_it_gives_it_back(tmp_path):
    one, other = FileLock(), FileLock()
    assert one.take(tmp_path / "lock")
    assert not other.take(tmp_path / "lock")
    assert not other.take(tmp_path / "lock", shared=True)
    one.release()
    one.release()
    assert other.take(tmp_path / "lock")


def test_those_who_share_it_keep_out_the_one_who_does_not(tmp_path):
    one, other, alone = FileLock(), FileLock(), FileLock()
    assert one.take(tmp_path / "lock", shared=True)
    assert other.take(tmp_path / "lock", shared=True)
    assert not alone.take(tmp_path / "lock")


def test_a_forked_child_that_outlives_the_holder_does_not_keep_it(tmp_path):
    """As a reward function's pool of processes, after a SIGKILL of the run."""
    fork = multiprocessing.get_context("fork")
    held, child_ready = fork.Event(), fork.Event()

    def child():
        child_ready.set()
        held.wait(PATIENCE)

    lock = FileLock()
    assert lock.take(tmp_path / "lock")
    process = fork.Process(target=child)
    process.start()
    assert child_ready.wait(PATIENCE)
    # What the system does with a process that is killed: its descriptors are closed.
    lock.release()
    assert process.is_alive()
    assert FileLock().take(tmp_path / "lock")
    held.set()
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_a_child_does_not_close_what_has_the_number_later(tmp_path):
    lock = FileLock()
    assert lock.take(tmp_path / "lock")
    lock.release()
    with open(tmp_path / "data", "wb") as file:
        child = os.fork()
        if child == 0:
            os._exit(0 if os.fstat(file.fileno()).st_ino else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_file_system_without_locks_does_not_stop_the_work(tmp_path, monkeypatch):
    def none(number, how):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert FileLock().take(tmp_path / "lock")


def test_it_follows_no_link_and_makes_no_file_where_it_should_not(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        FileLock().take(tmp_path / "link", link=False)
    with pytest.raises(FileNotFoundError):
        FileLock().take(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "elsewhere").exists()
