"""The hash of a growing token list, in O(new tokens), at any of its lengths.

Blocks of `BLOCK` tokens are chained: h(0) = "", h(b + 1) = blake2b(h(b) + block b), tokens as
little-endian int32. The hash of n tokens is blake2b(h(n // BLOCK) + the tokens behind that block).
So a step hashes its new tokens and at most one block, and whoever has the tokens and the chain
can tell the hash of every beginning: a list that was cut back is recognised as far as it holds.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
DIGEST_BYTES = 16
TOKEN = np.dtype("<i4")
_BLOCK_BYTES = BLOCK * TOKEN.itemsize

Tokens = NDArray[np.int32]


def as_bytes(tokens: NDArray[np.integer]) -> bytes:
    """Token ids, [n] within int32, as they go over the wire."""
    return tokens.astype(TOKEN, copy=False).tobytes()


class PrefixHash:
    """The hash of the tokens seen so far. chain[b]: h(b), of the first b blocks."""

    __slots__ = ("_digest", "_length", "_tail", "chain")

    def __init__(self) -> None:
        self.chain = [b""]
        self._length = 0
        self._tail = b""
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def digest(self) -> bytes:
        """The hash of all tokens so far."""
        if self._digest is None:
            self._digest = _hash(self.chain[-1], self._tail)
        return self._digest

    def extend(self, new: bytes) -> None:
        """Appends tokens, as of `as_bytes`."""
        if not new:
            return
        tail, done = self._tail + new, 0
        while len(tail) - done >= _BLOCK_BYTES:
            self.chain.append(_hash(self.chain[-1], tail[done : done + _BLOCK_BYTES]))
            done += _BLOCK_BYTES
        self._tail, self._digest = tail[done:], None
        self._length += len(new) // TOKEN.itemsize

    def truncate(self, length: int, tokens: NDArray[np.integer]) -> None:
        """Forgets what is behind the first `length` tokens, of which `tokens` has at least as many.

        In O(`BLOCK`).
        """
        if length == self._length:
            return
        blocks = length // BLOCK
        del self.chain[blocks + 1 :]
        self._tail, self._digest = as_bytes(tokens[blocks * BLOCK : length]), None
        self._length = length

    def at(self, length: int, tokens: NDArray[np.integer]) -> bytes:
        """The hash of the first `length` tokens, of which `tokens` has at least as many."""
        if length == self._length:
            return self.digest
        blocks = length // BLOCK
        return _hash(self.chain[blocks], as_bytes(tokens[blocks * BLOCK : length]))

    def at_block(self, block: int) -> bytes:
        """The hash of the first `block` blocks."""
        return _hash(self.chain[block], b"")

    def common(self, other: "PrefixHash") -> int:
        """How many tokens two lists share at their beginning, in whole blocks."""
        shared = 0
        for own, theirs in zip(self.chain[1:], other.chain[1:], strict=False):
            if own != theirs:
                break
            shared += BLOCK
        return shared


def hash_of(tokens: NDArray[np.integer]) -> PrefixHash:
    """The hash of a whole list."""
    made = PrefixHash()
    made.extend(as_bytes(tokens))
    return made


def _hash(before: bytes, tokens: bytes) -> bytes:
    return blake2b(before + tokens, digest_size=DIGEST_BYTES).digest()
