"""What stands for a text where values are looked up: a digest that grows with its tokens.

The worker and the front end see the same tokens, and nothing else in common: a processor is told
neither a request's id nor which of its `n` samples a row is. V of a text is the same in each.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from guided_decode.growable import Ints
from guided_decode.prefix import PrefixHandle


class GrowingText:
    """The digest of a text, token by token."""

    __slots__ = ("_hash", "length")

    def __init__(self, tokens: Sequence[int] | Ints = ()) -> None:
        self._hash = blake2b(digest_size=16)
        self.length = 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int] | Ints) -> None:
        """Adds token ids, [n]."""
        ids = np.asarray(tokens, np.int64)
        self._hash.update(ids.tobytes())
        self.length += len(ids)

    def digest(self) -> bytes:
        """16 bytes, of the tokens so far."""
        return self._hash.copy().digest()

    def digests_before(self, tokens: Sequence[int]) -> list[bytes]:
        """The digest before each of these token ids, [n], which it then has as well."""
        ids, found = np.asarray(tokens, np.int64).tobytes(), []
        for at in range(0, len(ids), 8):
            found.append(self._hash.copy().digest())
            self._hash.update(ids[at : at + 8])
        self.length += len(found)
        return found

    def copy(self) -> "GrowingText":
        """One that goes on by itself."""
        other = GrowingText()
        other._hash, other.length = self._hash.copy(), self.length
        return other


class HandleText:
    """A handle's history as it grows; only what is new is read."""

    __slots__ = ("_text", "_version")

    def __init__(self) -> None:
        self._text = GrowingText()
        self._version = -1

    def text(self, handle: PrefixHandle) -> GrowingText:
        """The whole history as it is now; of one handle, call after call. Not to be extended."""
        state = handle.state()
        if state.version != self._version or len(state.tokens) < self._text.length:
            self._text, self._version = GrowingText(), state.version
        self._text.extend(state.tokens[self._text.length :])
        return self._text
