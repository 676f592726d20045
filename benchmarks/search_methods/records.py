"""What was run, one line of JSON a batch; a run that is started again goes on after the last."""

import json
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.search_methods.decoding import Measured


@dataclass(frozen=True)
class Batch:
    """A setting on prompts first ... first + count of a set ("validation" or "held-out")."""

    policy: str
    prompts: str
    key: str
    first: int
    count: int


@dataclass(frozen=True)
class Total:
    """A setting on all prompts of a set that were run: right as float64 [prompts]; tokens and
    FLOPs are means of a prompt."""

    right: np.ndarray
    drawn: float
    forwarded: float
    scorer: float

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def tokens(self, counting: str) -> float:
        """Of policy and critic; counting: "drawn" or "forwarded", what the policy's are."""
        return (self.drawn if counting == "drawn" else self.forwarded) + self.scorer


class Records:
    """The lines of a file, and what is added to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[Batch, Measured] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            return  # the line that was being written when the run was ended
        self._known[Batch(**found["batch"])] = Measured(**found["measured"])

    def __contains__(self, batch: Batch) -> bool:
        return batch in self._known

    def add(self, batch: Batch, measured: Measured) -> None:
        """Keeps a batch, on disk at once."""
        self._known[batch] = measured
        line = json.dumps({"batch": asdict(batch), "measured": asdict(measured)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = "\n" if self._is_cut() else ""
        with self.path.open("a") as file:
            file.write(f"{begun}{line}\n")

    def _is_cut(self) -> bool:
        # A run that was ended in the middle of a line leaves it without its end.
        return self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n")

    def totals(self, policy: str, prompts: str, most: int) -> dict[str, Total]:
        """By setting's key, over the first `most` prompts: those settings that have all of them."""
        found: dict[str, list[tuple[Batch, Measured]]] = defaultdict(list)
        for batch, measured in self._known.items():
            own = (batch.policy, batch.prompts) == (policy, prompts)
            if own and batch.first + batch.count <= most:
                found[batch.key].append((batch, measured))
        return {
            key: _total([m for _, m in sorted(own, key=lambda pair: pair[0].first)])
            for key, own in found.items()
            if sum(batch.count for batch, _ in own) == most
        }

    def common(self, policy: str, prompts: str, keys: Set[str]) -> int:
        """The largest number of first prompts of a set that all these settings have had."""
        ends = {
            batch.first + batch.count
            for batch in self._known
            if (batch.policy, batch.prompts) == (policy, prompts)
        }
        had = (
            n for n in sorted(ends, reverse=True) if keys <= self.totals(policy, prompts, n).keys()
        )
        return next(had, 0)


def _total(batches: Iterable[Measured]) -> Total:
    batches = list(batches)
    right = np.concatenate([np.asarray(each.right, dtype=np.float64) for each in batches])
    n = len(right)
    return Total(
        right,
        sum(each.drawn for each in batches) / n,
        sum(each.forwarded for each in batches) / n,
        sum(each.scorer for each in batches) / n,
    )
