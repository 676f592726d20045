"""The records of a run on disk, a record a line, from the moment that each comes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import read_records

Record = dict[str, Any]


class Records:
    """Files of records in a folder; each part of a run writes its own."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._folder = out / "records"

    def begin(self, about: Record) -> None:
        """Starts a run: the records of the one before go."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("*.jsonl"):
            old.unlink()
        (self._folder / "about.json").write_text(json.dumps(about, default=str))

    def about(self) -> Record:
        """Date, command and machine of the run. Raises FileNotFoundError: there was none."""
        return json.loads((self._folder / "about.json").read_text())

    def file(self, name: str) -> Path:
        """Where a part writes its records; files are read in the order in which they are named."""
        known = sorted(self._folder.glob("*.jsonl"))
        for file in known:
            if file.stem.partition("-")[2] == name:
                return file
        file = self._folder / f"{len(known):02}-{name}.jsonl"
        file.touch()
        return file

    def add(self, name: str, records: Sequence[Record]) -> None:
        """Appends records that came outside a part's process."""
        with self.file(name).open("a") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in records)

    def all(self) -> list[Record]:
        """Every record that was finished."""
        files = sorted(self._folder.glob("*.jsonl"))
        return [record for file in files for record in read_records(file)]
