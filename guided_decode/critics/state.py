"""The state of a training on disk: what a run that was killed goes on from, to the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_STATE, _BEST = "state.pt", "best.pt"


class StateFiles:
    """Two files in a folder: all of a training, and the weights of its best epoch so far.

    Each is replaced as a whole, so that a kill leaves the old one or the new one.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """run: what the training follows from, by name; another run's files do not count."""
        self._folder, self._run = folder, run

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None where there is none of this run."""
        return self._read(_STATE)

    def of_another(self) -> bool:
        """Whether a state lies there that is another run's."""
        return (self._folder / _STATE).is_file() and self.load() is None

    def save(self, state: dict[str, Any]) -> None:
        """Keeps a state. Raises OSError: it cannot be written."""
        self._write(_STATE, state)

    def load_best(self) -> dict[str, Any] | None:
        """The weights of the best epoch, by name, as `save_best` had them."""
        return self._read(_BEST)

    def save_best(self, weights: dict[str, Any]) -> None:
        """Keeps an epoch's weights. Raises OSError: they cannot be written."""
        self._write(_BEST, weights)

    def remove(self) -> None:
        """Takes both files away."""
        for name in (_STATE, _BEST):
            (self._folder / name).unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        if not path.is_file():
            return None
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return stored["state"] if stored["run"] == self._run else None

    def _write(self, name: str, state: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{name}.partial"
        with open(partial, "wb") as file:
            torch.save({"run": self._run, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._folder / name)
