"""One client of a scorer server: its line, its sessions, and the lock over both."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.client_sessions import ClientSessions, Read, Told
from guided_decode.scoring.remote.connection import Line
from guided_decode.scoring.remote.failures import ScorerServerError
from guided_decode.scoring.remote.keys import ClientKeys

# A request, of its number, its rows and the sessions that are over.
MakeRequest = Callable[[int, list[wire.Row], list[int]], wire.Request]


class Client:
    """Shared by the models of one scorer; a fork and a copy have their own line and sessions."""

    def __init__(
        self, address: str, keys: ClientKeys | None, connect_seconds: float, timeout: float
    ) -> None:
        """Arguments as of `Line`."""
        self.line = Line(address, keys, connect_seconds, timeout)
        self.sessions = ClientSessions()
        self.rows_asked_again = 0
        self._lock = threading.RLock()
        weakref.finalize(self, self.line.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Client":
        line = self.line
        copied = Client(line.address, line.keys, line.connect_seconds, line.timeout)
        copied.line.welcome = line.welcome
        memo[id(self)] = copied
        return copied

    @property
    def lock(self) -> threading.RLock:  # type: ignore[valid-type]
        """Held by one call at a time."""
        if self.line.forget_process():
            self._lock = threading.RLock()
            self.sessions = ClientSessions()
        return self._lock

    def ask(
        self, prefixes: Sequence[Read], request: MakeRequest, *buffers: bytes
    ) -> tuple[wire.Reply, Sequence[bytes], list[Told]]:
        """Asks about rows; those that the server does not know are sent again, in full.

        Raises ValueError, ScorerServerError: as `Line.ask`.
        """
        with self.lock:
            sessions = self.sessions
            closed = sessions.closed()
            try:
                return self._ask(
                    [sessions.tell(read) for read in prefixes], closed, request, buffers
                )
            except BaseException:
                sessions.untold(closed)
                raise

    def simple(self, kind: Callable[[int], wire.Request]) -> wire.Reply:
        """The reply to a request that is nothing but its number."""
        with self.lock:
            return self.line.ask(kind(self.line.next_id()))[0]

    def close(self) -> None:
        """Leaves the server, which forgets this client's sessions; a later call comes back."""
        with self.lock:
            self.line.close()

    def _ask(
        self, rows: list[Told], closed: list[int], request: MakeRequest, buffers: Sequence[bytes]
    ) -> tuple[wire.Reply, Sequence[bytes], list[Told]]:
        # The second time what it asks for; if it forgot others meanwhile, all of it.
        for attempt in range(3):
            header = request(self.line.next_id(), [told.row for told in rows], closed)
            new = b"".join([told.new for told in rows])
            reply, answer = self.line.ask(header, new, *buffers)
            if not isinstance(reply, wire.Missing):
                self.sessions.told(rows)
                return reply, answer, rows
            again = set(range(len(rows)) if attempt else reply.rows)
            self.rows_asked_again += len(again)
            rows = [self.sessions.in_full(t) if i in again else t for i, t in enumerate(rows)]
        raise ScorerServerError(
            f"the scorer server at {self.line.address} asks for rows that it was sent in full"
        )
