"""A lock on a file that ends with the process that took it, however it ends."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """`fcntl.flock` through a descriptor of its own.

    The system drops the lock with the last descriptor of it. A forked child has one, too, and may
    outlive us: it closes its own at once, so that the lock is of this process alone.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def take(
        self,
        path: Path,
        *,
        shared: bool = False,
        create: bool = True,
        link: bool = True,
        mode: int = 0o644,
    ) -> bool:
        """Whether we got it, or cannot know: there are systems and file systems without locks.

        Args:
            path: of the file, which stays when the lock goes.
            shared: others may take it in the same way.
            create: makes the file where there is none, with `mode`.
            link: the path may be a symbolic link.

        Raises OSError: the file cannot be opened.
        """
        try:
            from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
        except ImportError:  # not a POSIX system
            return True
        flags = (os.O_CREAT if create else 0) | (0 if link else os.O_NOFOLLOW)
        try:
            # NFS locks for itself alone only what is open for writing.
            number = os.open(path, os.O_RDWR | flags, mode)
        except PermissionError:  # another user's
            number = os.open(path, os.O_RDONLY | flags, mode)
        try:
            flock(number, (LOCK_SH if shared else LOCK_EX) | LOCK_NB)
        except BlockingIOError:
            os.close(number)
            return False
        except OSError:
            # A file system without locks: better no lock than no work.
            os.close(number)
            return True
        self._number = number
        _HELD.add(self)
        return True

    def release(self) -> None:
        """Gives it back; does nothing where it is not held."""
        if self._number is not None:
            number, self._number = self._number, None
            _HELD.discard(self)
            os.close(number)


def _forget() -> None:
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
