"""The histories of clients' prefixes, as the server keeps them: bounded, and never trusted."""

import copy
import time
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from guided_decode.growable import Ints
from guided_decode.prefix import PrefixHandle
from guided_decode.scoring.remote.prefix_hash import PrefixHash, Tokens, as_bytes, hash_of
from guided_decode.scoring.remote.wire import Row
from guided_decode.serving.limits import Limits

_Key = tuple[bytes, int]


class _Session:
    """A prefix: its handle, by which a scorer's cache finds it again, and its hash.

    waiting: rows of it that are not answered yet.
    """

    __slots__ = ("handle", "hash", "used", "waiting")

    def __init__(self) -> None:
        self.handle = PrefixHandle()
        self.hash = PrefixHash()
        self.used = 0.0
        self.waiting = 0


class Sessions:
    """Sessions by client and number, in the order of their last use.

    A client's sessions are its own: what it says of others' is not looked up. tokens: of all
    sessions together. evicted: sessions that had to go for others.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[_Key, _Session] = OrderedDict()
        self._clients: dict[bytes, set[int]] = {}
        self.tokens = 0
        self.evicted = 0
        self.expired = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def clients(self) -> int:
        return len(self._clients)

    def resolve(self, client: bytes, row: Row, new: Tokens) -> "HeldPrefix | None":
        """The row's prefix; None where the tokens that it builds on are not known.

        new: int32 [row.new].
        """
        own = self._sessions.get((client, row.session))
        base = own if row.base == row.session else self._sessions.get((client, row.base))
        if row.known and not _knows(base, row):
            return None
        if not row.session:
            known = () if base is None else base.handle.tokens[: row.known]
            return HeldPrefix(np.concatenate([known, new]) if row.known else new.astype(np.int64))
        if own is None:
            own = self._open(client, row.session)
        self._touch(client, row.session, own)
        if own is base or not (row.known or len(own.hash)):
            self._go_on(own, row.known, new)
        else:
            held = base.handle.tokens[: row.known] if base is not None and row.known else new[:0]
            self._become(own, np.concatenate([held, new]))
        self._make_room(own)
        return HeldPrefix(own.handle, own)

    def close(self, client: bytes, numbers: Iterable[int]) -> None:
        """Forgets sessions of a client."""
        for number in numbers:
            self._drop((client, number))

    def leave(self, client: bytes) -> None:
        """Forgets a client."""
        self.close(client, list(self._clients.get(client, ())))

    def expire(self) -> None:
        """Forgets what was not used for too long."""
        last = time.monotonic() - self._limits.session_seconds
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if session.used > last:
                break
            self._drop(key)
            self.expired += 1

    def _open(self, client: bytes, number: int) -> _Session:
        session = self._sessions[client, number] = _Session()
        self._clients.setdefault(client, set()).add(number)
        return session

    def _touch(self, client: bytes, number: int, session: _Session) -> None:
        session.used = time.monotonic()
        self._sessions.move_to_end((client, number))

    def _grow(self, session: _Session, new: Tokens) -> None:
        if not len(new):
            return
        self._to_write(session)
        if len(new) == 1:
            session.handle.append(int(new[0]))
        else:
            session.handle.extend(new.astype(np.int64))
        session.hash.extend(as_bytes(new))
        self.tokens += len(new)

    def _go_on(self, session: _Session, known: int, new: Tokens) -> None:
        """The first `known` of its tokens and the new ones, in O(those that it gives up and gets).

        A request that came twice gives up nothing.
        """
        given_up = session.handle.tokens[known:]
        compared = min(len(given_up), len(new))
        differs = given_up[:compared] != new[:compared]
        same = int(differs.argmax()) if differs.any() else compared
        if same < len(given_up):
            self._to_write(session)
            self.tokens -= len(given_up) - same
            session.handle.rewind(known + same)
            session.hash.truncate(known + same, session.handle.tokens)
        self._grow(session, new[same:])

    def _become(self, session: _Session, tokens: NDArray[np.integer]) -> None:
        """Other tokens, or those that it has, of a request that came twice."""
        if np.array_equal(tokens, session.handle.tokens):
            return
        self._to_write(session)
        self.tokens += len(tokens) - len(session.handle)
        session.handle.sync(tokens.astype(np.int64))
        session.hash = hash_of(tokens)

    @staticmethod
    def _to_write(session: _Session) -> None:
        """A row that waits keeps the tokens that it came with."""
        if session.waiting:
            session.handle = copy.copy(session.handle)
            session.waiting = 0

    def _make_room(self, kept: _Session) -> None:
        limits = self._limits
        while len(self._sessions) > limits.max_sessions or self.tokens > limits.max_session_tokens:
            key, session = next(iter(self._sessions.items()))
            if session is kept:
                break
            self._drop(key)
            self.evicted += 1

    def _drop(self, key: _Key) -> None:
        session = self._sessions.pop(key, None)
        if session is None:
            return
        self.tokens -= len(session.handle)
        client, number = key
        own = self._clients[client]
        own.discard(number)
        if not own:
            del self._clients[client]


class HeldPrefix:
    """A row's prefix while it waits: a handle, or plain tokens."""

    __slots__ = ("_session", "tokens")

    def __init__(
        self,
        tokens: PrefixHandle | Ints,
        session: _Session | None = None,
    ) -> None:
        self.tokens = tokens
        self._session = session
        if session is not None:
            session.waiting += 1

    def answered(self) -> None:
        """The row no longer waits."""
        session = self._session
        if session is not None and session.handle is self.tokens and session.waiting:
            session.waiting -= 1
        self._session = None


def _knows(base: _Session | None, row: Row) -> bool:
    """Whether a session begins with the tokens that a row builds on."""
    if base is None or row.known > len(base.hash):
        return False
    return base.hash.at(row.known, base.handle.tokens) == row.digest
