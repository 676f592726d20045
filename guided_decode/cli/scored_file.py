"""The output of `score`: lines that a run may stop at any moment, and the next one goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from guided_decode.cli.errors import Refusal


def line_key(line: str, *settings: object) -> str:
    """What an output line is the answer to: the input line and the settings it was scored with."""
    text = json.dumps([line, *map(str, settings)])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class ScoredFile:
    """JSON lines, one for each key in its order, appended and never rewritten.

    `done` counts the lines that earlier runs finished. A last line that is not whole, as a kill
    leaves it, is dropped; whatever else does not answer the keys is refused.
    """

    def __init__(self, path: Path, keys: Sequence[str], *, overwrite: bool = False) -> None:
        """Opens or creates the file.

        Raises Refusal: the file holds what these keys do not ask for. OSError: it cannot be
        written.
        """
        self.path = path
        self._file = open(path, "wb+" if overwrite else "ab+")  # noqa: SIM115
        try:
            self._file.seek(0)
            whole = [line for line in self._file if line.endswith(b"\n")]
            self._check(whole, keys)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(sum(map(len, whole)))
        self.done = len(whole)

    def _check(self, whole: Sequence[bytes], keys: Sequence[str]) -> None:
        for number, line in enumerate(whole, start=1):
            try:
                key = json.loads(line)["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise Refusal(
                    f"{self.path}, line {number}: no line of this command's output; "
                    "pass another file, or --overwrite"
                ) from error
            if number > len(keys) or key != keys[number - 1]:
                raise Refusal(
                    f"{self.path}, line {number}: scored from another input or with other "
                    "settings; pass another file, or --overwrite"
                )

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes finished lines; they are the system's when this returns, and outlive a kill."""
        text = "".join(
            json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines
        )
        self._file.write(text.encode())
        self._file.flush()

    def __enter__(self) -> ScoredFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
