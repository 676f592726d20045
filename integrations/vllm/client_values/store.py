"""What the worker keeps of rows until somebody fetches it: bounded, whoever forgets to."""

import functools
import logging
from collections.abc import Iterable

from guided_decode.integrations.vllm.client_values.records import Record, encoded

logger = logging.getLogger("guided_decode")

_MOST_BYTES = 64 * 2**20


class ValueStore:
    """Records by the names of requests; what was not fetched for the longest time goes first."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        """most_bytes: what all records may take."""
        self._most = most_bytes
        self._records: dict[str, list[Record]] = {}
        self._sizes: dict[str, int] = {}
        self._dropped = False
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, name: str, record: Record) -> None:
        """Keeps a record. name: of the request; nobody else can guess it."""
        self._records.setdefault(name, []).append(record)
        self._sizes[name] = self._sizes.get(name, 0) + record.size
        self.bytes += record.size
        while self.bytes > self._most:
            if not self._dropped:
                logger.warning(
                    "values that no client fetched are dropped: %d MiB are kept at most",
                    self._most // 2**20,
                )
            self._dropped = True
            self._pop(next(iter(self._records)))

    def take(self, names: Iterable[str]) -> bytes:
        """The records of these requests as `decoded` reads them; they are kept no longer."""
        return encoded({name: self._pop(name) for name in names if name in self._records})

    def _pop(self, name: str) -> list[Record]:
        self.bytes -= self._sizes.pop(name)
        return self._records.pop(name)


@functools.cache
def of_this_process() -> ValueStore:
    """The worker's. Names are unguessable, so that engines in one process may share it."""
    return ValueStore()
