"""What a scorer has done so far, in numbers that tests can assert on."""

import operator
import threading
from dataclasses import dataclass, fields

# Counts are added in moments: one lock for all counters, so that they stay plain records.
_LOCK = threading.Lock()


@dataclass(slots=True)
class ScorerStats:
    """Counters of one scorer, from its creation or the last `reset`; any thread may `add`.

    rows_scored, rows_gated: rows whose candidates were scored; rows that the gate let pass.
    prefix_tokens, candidate_tokens: tokens that went through the model, by what they were.
    cache_hits: tokens of prefixes and candidates that were found in the cache.
    evictions: tokens that were dropped from the cache to make room.
    passthroughs: rows whose logits were handed on unguided because scoring them failed.
    forwards, forward_seconds: calls of the model, and host time spent in them.
    seconds: host time spent in `score`, all of it.
    """

    rows_scored: int = 0
    rows_gated: int = 0
    prefix_tokens: int = 0
    candidate_tokens: int = 0
    cache_hits: int = 0
    evictions: int = 0
    passthroughs: int = 0
    forwards: int = 0
    forward_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prefix_tokens + self.candidate_tokens

    def add(self, **counts: float) -> None:
        """Adds to counters by name, without losing what another thread adds."""
        with _LOCK:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def reset(self) -> None:
        """Sets every counter to zero."""
        with _LOCK:
            for field in fields(self):
                setattr(self, field.name, field.default)

    def as_dict(self) -> dict[str, float]:
        """The counters by name, for logs and JSON."""
        with _LOCK:
            return dict(zip(_NAMES, _values(self), strict=True))


_NAMES = tuple(field.name for field in fields(ScorerStats))
_values = operator.attrgetter(*_NAMES)
