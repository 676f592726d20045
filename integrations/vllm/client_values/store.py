"""What the worker keeps of rows until somebody fetches it: bounded, whoever forgets to."""

import functools
import logging
from collections import deque
from collections.abc import Iterable

from guided_decode.integrations.vllm.client_values.records import Record, encoded

logger = logging.getLogger("guided_decode")

MOST_MIB = 64


class ValueStore:
    """Records by the names of requests; of the one that was not fetched for the longest time the
    oldest go first."""

    def __init__(self, most_bytes: int = MOST_MIB * 2**20) -> None:
        """most_bytes: what all records may take."""
        self._most = most_bytes
        self._records: dict[str, deque[Record]] = {}
        self._dropped = False
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, name: str, record: Record) -> None:
        """Keeps a record. name: of the request; nobody else can guess it."""
        self._records.setdefault(name, deque()).append(record)
        self.bytes += record.size
        while self.bytes > self._most:
            if not self._dropped:
                logger.warning(
                    "values that no client fetched are dropped: %d MiB are kept at most",
                    self._most // 2**20,
                )
            self._dropped = True
            self._drop_oldest()

    def take(self, names: Iterable[str]) -> bytes:
        """The records of these requests as `decoded` reads them; they are kept no longer."""
        taken = {name: self._records.pop(name) for name in names if name in self._records}
        self.bytes -= sum(record.size for records in taken.values() for record in records)
        return encoded({name: list(records) for name, records in taken.items()})

    def _drop_oldest(self) -> None:
        name, records = next(iter(self._records.items()))
        self.bytes -= records.popleft().size
        if not records:
            del self._records[name]


@functools.cache
def of_this_process() -> ValueStore:
    """The worker's. Names are unguessable, so that engines in one process may share it."""
    return ValueStore()
