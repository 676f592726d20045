"""What of a batch is finished before the rest, kept beside the output until it stands there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guided_decode.cli.score_run import STDOUT
from guided_decode.cli.scored_file import as_line
from guided_decode.cli.search_rows import SearchRow


class Ahead:
    """Output lines whose turn has not come: the output has one for each prompt, in their order.

    They lie in OUTPUT.ahead, each from the moment that its search ended, so that neither a kill nor
    a server's end loses it; the file is gone when its lines are in the output.
    """

    def __init__(self, output: Path, run: str, *, overwrite: bool = False) -> None:
        """
        Args:
            output: where lines go in the end; stdout has no file beside it.
            run: what they are computed with, by name; others' lines do not count.
            overwrite: what the file holds does not count.
        """
        self._path = None if output == STDOUT else output.with_name(f"{output.name}.ahead")
        self._lines: dict[tuple[int, str], dict[str, Any]] = {}
        self._torn = False
        if self._path is not None and self._path.exists() and not overwrite:
            for text in self._path.read_bytes().splitlines(keepends=True):
                self._take(text, run)
                self._torn = not text.endswith(b"\n")

    def _take(self, text: bytes, run: str) -> None:
        try:
            line = json.loads(text)
            # Half a line, as a kill leaves it, is no JSON, or has no end.
            if text.endswith(b"\n") and line["run"] == run:
                self._lines[line["line"], line["key"]] = line
        except (ValueError, KeyError, TypeError, RecursionError):
            return

    def get(self, row: SearchRow) -> dict[str, Any] | None:
        """The line of a prompt that was finished; None: it was not."""
        return self._lines.get((row.number, row.key))

    def put(self, row: SearchRow, line: dict[str, Any]) -> None:
        """Keeps a finished line. Raises OSError: it cannot be written."""
        if self._path is not None:
            if not self._lines:
                # What others left does not count.
                self._path.unlink(missing_ok=True)
            with self._path.open("ab") as file:
                # Behind half a line it would be a part of that.
                file.write(b"\n" * self._torn + as_line(line))
            self._torn = False
        self._lines[row.number, row.key] = line

    def settle(self, rows: list[SearchRow]) -> None:
        """Forgets the lines of these prompts, which stand in the output."""
        for row in rows:
            self._lines.pop((row.number, row.key), None)
        if self._path is not None and not self._lines:
            self._path.unlink(missing_ok=True)
