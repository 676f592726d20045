"""What a scorer server counts."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class ServerCounts:
    """Since its start, over all clients.

    requests: about rows; rows: answered with scores; rounds: of scoring, each of all that waited.
    rows_asked_again: whose tokens it did not know. failed: requests that the scorer refused or
    failed at; busy: refused because too much waited; malformed: messages that were none.
    seconds: in the scorer.
    """

    requests: int = 0
    rows: int = 0
    rounds: int = 0
    rows_asked_again: int = 0
    failed: int = 0
    busy: int = 0
    malformed: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
