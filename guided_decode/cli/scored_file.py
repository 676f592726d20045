"""The output of `score`: lines that a run may stop at any moment, and the next one goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from guided_decode.cli.errors import Refusal
from guided_decode.cli.jsonl import place
from guided_decode.serving.file_lock import FileLock

_NEW = "pass another file, or --overwrite"


class ScoredFile:
    """JSON lines, one for each key in its order, appended and never rewritten.

    The file is locked as long as it is open, so that two runs cannot write to it.
    `done` counts the lines that earlier runs finished, `failed` those of them that are an error. A
    last line that is not whole, as a kill leaves it, is dropped; whatever else does not answer the
    keys is refused. Nothing is changed before `begin`.
    """

    def __init__(
        self, path: Path, keys: Sequence[str], run: str, *, overwrite: bool = False
    ) -> None:
        """Opens or creates the file.

        Args:
            path: where it is.
            keys: of the input's lines.
            run: what they are scored with, by name.
            overwrite: what the file holds does not count, and goes at `begin`.

        Raises Refusal: the file holds what these keys do not ask for, or was written by another
        run; another process writes to it; it is no file that can be continued. OSError: it cannot
        be written.
        """
        self.path = path
        self._alone = FileLock()
        self._created = not path.exists()
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115
        whole: list[bytes] = []
        self.failed = 0
        try:
            self._lock()
            self._refuse_removed()
            if not overwrite:
                self._file.seek(0)
                with open(self._file.fileno(), "rb", closefd=False) as lines:
                    whole = [line for line in lines if line.endswith(b"\n")]
                self._check(whole, keys, run)
        except BaseException:
            self._close()
            raise
        self._length = sum(map(len, whole))
        self.done = len(whole)

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            raise Refusal(f"{self.path} is no regular file, so it cannot be continued: pass a "
                          "file, or - for stdout")  # fmt: skip
        try:
            taken = self._alone.take(self.path, create=False)
        except FileNotFoundError:
            raise self._removed() from None
        if not taken:
            raise Refusal(f"{self.path} is being written by another run: let it end, or pass "
                          "another file")  # fmt: skip

    def _check(self, whole: Sequence[bytes], keys: Sequence[str], run: str) -> None:
        for number, text in enumerate(whole, start=1):
            try:
                line = json.loads(text)
                key, computed_by, failed = line["key"], line["run"], "error" in line
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Refusal(
                    f"{place(self.path, number)}: no line of this command's output; {_NEW}"
                ) from error
            if computed_by != run:
                raise Refusal(
                    f"{place(self.path, number)}: made from another input or with other "
                    "settings: here another model, other weights under its name, another dtype, "
                    f"method, seed or option; {_NEW}"
                )
            if number > len(keys) or key != keys[number - 1]:
                raise Refusal(
                    f"{place(self.path, number)}: made from another input or with other "
                    f"settings: here another line of the input; {_NEW}"
                )
            self.failed += failed

    def begin(self) -> None:
        """Drops what does not count: half a line, or what is overwritten."""
        self._file.truncate(self._length)

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes finished lines; they are the system's when this returns, and outlive a kill.

        Raises OSError, with the file's name: it cannot be written.
        """
        text = b"".join(map(as_line, lines))
        try:
            while text:
                text = text[self._file.write(text) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _refuse_removed(self) -> None:
        """Raises Refusal: between opening and locking, another run took its empty file away."""
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            same = False
        if not same:
            raise self._removed()

    def _removed(self) -> Refusal:
        return Refusal(f"{self.path} was removed by another run just now: run it again")

    def __enter__(self) -> ScoredFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._created and os.fstat(self._file.fileno()).st_size == 0:
            # Nothing came of it: no file either.
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()

    def _close(self) -> None:
        self._file.close()
        self._alone.release()


class ScoredStream:
    """The same lines on stdout, where nothing is found and nothing can be continued."""

    path = "stdout"
    done = failed = 0

    def begin(self) -> None:
        """Nothing is dropped."""

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes finished lines. Raises OSError: they cannot be written."""
        output: IO[bytes] = sys.stdout.buffer
        output.write(b"".join(map(as_line, lines)))
        output.flush()

    def __enter__(self) -> ScoredStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def as_line(line: dict[str, Any]) -> bytes:
    """One line of the output."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
