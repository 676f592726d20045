"""What a client knows that its server knows: one session a prefix handle."""

import itertools
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from guided_decode.growable import Ints
from guided_decode.prefix import PrefixHandle
from guided_decode.scoring.remote.prefix_hash import BLOCK, PrefixHash, as_bytes, hash_of
from guided_decode.scoring.remote.wire import Row

# Sessions whose end one request tells; the others wait for the next.
_MOST_CLOSED = 1024


class _Session:
    """hash: of the tokens that the server was last told; version: of the handle that had them."""

    __slots__ = ("hash", "number", "version")

    def __init__(self, number: int) -> None:
        self.number = number
        self.hash = PrefixHash()
        self.version = -1


class Read(NamedTuple):
    """A prefix as it was at one moment: tokens, int64 [n] within int32. handle, version: where it
    is one."""

    tokens: Ints
    handle: PrefixHandle | None = None
    version: int = 0


class Told(NamedTuple):
    """A row of a request: what is sent, and what the server knows once it has answered.

    tokens: the whole prefix, int64 [n]. new: the bytes of those that are sent. whole: the hash of
    all of it where that is made already. version: of the handle. since: that of the session when it
    was told, from which the hash goes on where there is no whole one.
    """

    row: Row
    tokens: Ints
    new: bytes
    session: _Session | None = None
    whole: PrefixHash | None = None
    version: int = 0
    since: int = 0


class ClientSessions:
    """Tells rows by what is new in them. One lock above it: the client's."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._sessions: weakref.WeakKeyDictionary[PrefixHandle, _Session] = (
            weakref.WeakKeyDictionary()
        )
        # Where each block of tokens was sent last, by the hash of all up to it.
        self._blocks: dict[bytes, int] = {}
        self._chains: dict[int, PrefixHash] = {}
        # Filled when handles go, on any thread and at any time.
        self._gone: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._chains)

    def tell(self, read: Read) -> Told:
        """The row of a prefix, as little of it as the server needs."""
        tokens = read.tokens
        if read.handle is None:
            return Told(Row(0, 0, 0, len(tokens), b""), tokens, as_bytes(tokens))
        session = self._sessions.get(read.handle) or self._open(read.handle)
        number, known, whole = session.number, _held(session, read), None
        if known is None:
            whole = hash_of(tokens)
            base, known, digest = self._found(session, whole)
        else:
            digest = session.hash.at(known, tokens) if known else b""
            base = number if known else 0
        new = as_bytes(tokens[known:])
        row = Row(number, base, known, len(tokens) - known, digest)
        return Told(row, tokens, new, session, whole, read.version, session.version)

    def in_full(self, told: Told) -> Told:
        """The same row for a server that knows nothing of it."""
        row = Row(told.row.session, 0, 0, len(told.tokens), b"")
        return told._replace(row=row, new=as_bytes(told.tokens))

    def told(self, rows: Sequence[Told]) -> None:
        """The server has answered: it knows these."""
        for told in rows:
            session = told.session
            if session is None:
                continue
            known, hashed = told.row.known, session.hash
            goes_on, rewound = told.whole is None, told.since != told.version
            # A handle may stand in several rows, and others may have gone on in between.
            if goes_on and session.version == told.since and (rewound or known == len(hashed)):
                self._forget(hashed, session.number, known // BLOCK)
                hashed.truncate(known, told.tokens)
                hashed.extend(told.new)
                session.version = told.version
            elif not (goes_on and session.version == told.version) or len(told.tokens) > len(
                hashed
            ):
                self._forget(hashed, session.number)
                hashed = hash_of(told.tokens) if told.whole is None else told.whole
                session.hash, session.version = hashed, told.version
                self._chains[session.number] = hashed
                known = 0
            for block in range(known // BLOCK + 1, len(hashed.chain)):
                self._blocks[hashed.chain[block]] = session.number

    def closed(self) -> list[int]:
        """Sessions whose handles are gone, once each."""
        numbers: list[int] = []
        while self._gone and len(numbers) < _MOST_CLOSED:
            numbers.append(self._gone.popleft())
            self._forget(self._chains.pop(numbers[-1], None), numbers[-1])
        return numbers

    def untold(self, closed: Collection[int]) -> None:
        """The server did not hear of these ends."""
        self._gone.extend(closed)

    def _open(self, handle: PrefixHandle) -> _Session:
        session = self._sessions[handle] = _Session(next(self._numbers))
        self._chains[session.number] = session.hash
        weakref.finalize(handle, self._gone.append, session.number).atexit = False
        return session

    def _found(self, session: _Session, whole: PrefixHash) -> tuple[int, int, bytes]:
        """(base, known tokens, their hash): what the server has of this prefix."""
        shared = session.hash.common(whole)
        base = session.number
        for block in range(len(whole.chain) - 1, shared // BLOCK, -1):
            other = self._blocks.get(whole.chain[block])
            if other is not None:
                base, shared = other, block * BLOCK
                break
        if not shared:
            return 0, 0, b""
        return base, shared, whole.at_block(shared // BLOCK)

    def _forget(self, hashed: PrefixHash | None, number: int, kept: int = 0) -> None:
        """That blocks were sent, all but the first `kept`."""
        for digest in () if hashed is None else hashed.chain[kept + 1 :]:
            if self._blocks.get(digest) == number:
                del self._blocks[digest]


def _held(session: _Session, read: Read) -> int | None:
    """How many tokens the server has of the prefix by its session alone; None: a hash will tell."""
    told = len(session.hash)
    if session.version == read.version:
        return told if told <= len(read.tokens) else None
    if read.handle is None or read.version < session.version:
        return None
    # Rewound, and gone on from there: what it gave up is all that changed.
    return min(told, read.handle.kept(session.version)) or None
