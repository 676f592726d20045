"""What a scorer server lets its clients take."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one server, over all its clients.

    max_waiting_tokens: new tokens and candidates of requests that wait; more are refused as busy.
    max_message_bytes: the most of one frame; a client that sends more is cut off.
    max_sessions: prefixes whose tokens are kept. session_tokens: tokens of all of them together.
        Beyond either the one that was used least recently goes.
    session_seconds: after so long without use a prefix goes.
    round_tokens: new tokens and candidates of one round of scoring, which clients share evenly.
    """

    max_waiting_tokens: int = 1 << 20
    max_message_bytes: int = 64 << 20
    max_sessions: int = 4096
    max_session_tokens: int = 1 << 25
    session_seconds: float = 600.0
    round_tokens: int = 8192

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            whole = field.name == "session_seconds" or isinstance(given, int)
            if not whole or not 0 < given < 2**53:
                expected = "seconds above 0" if field.name == "session_seconds" else "at least 1"
                raise ValueError(f"{field.name}={given!r}: expected {expected}")
