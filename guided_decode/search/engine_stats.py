"""What a generator has asked of its engine so far, in numbers."""

from __future__ import annotations

import threading
from dataclasses import dataclass

# Counts are added in moments: one lock for all counters, so that they stay plain records.
_LOCK = threading.Lock()


@dataclass(slots=True)
class EngineStats:
    """Counters of a generator whose engine is another process; any thread may `add`.

    requests: sent, each try of them. retries: those of them that were sent again. prompt_tokens,
    generated_tokens: of the requests that were answered; engines with a prefix cache forward fewer
    of the prompts'.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that were read or written, those of cached prompts among them."""
        return self.prompt_tokens + self.generated_tokens

    def add(self, **counts: int) -> None:
        """Adds to counters by name, without losing what another thread adds."""
        with _LOCK:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)
