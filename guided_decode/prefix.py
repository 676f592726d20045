"""Prefix handles: append-only token histories that a scorer looks up by their new tokens only."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from guided_decode.growable import GrowableInts, Ints


def as_ints(tokens: "Sequence[int] | Ints | Tensor") -> Ints:
    """Token ids as int64 [n]; a tensor may live on any device."""
    if isinstance(tokens, Tensor):
        tokens = tokens.detach().cpu().numpy()
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"a prefix came as {array.dtype} with shape {list(array.shape)}: expected one "
            "dimension of integer token ids, without padding"
        )
    return array.astype(np.int64, copy=False)


class PrefixHandle:
    """The token history of one request: unpadded ids, prompt first, that only grow.

    A scorer remembers where the handle stood in its cache, so that a look-up verifies only the
    tokens appended since. Handing over a list that shrank or changed (`sync`) resets the handle:
    the answer stays right, the next look-up is a full one.
    """

    __slots__ = ("__weakref__", "_ids", "highest", "lowest", "version")

    def __init__(self, tokens: "Sequence[int] | Ints | Tensor" = ()) -> None:
        self.version = 0
        self.lowest = self.highest = 0
        self._ids = GrowableInts()
        self.extend(tokens)

    def __len__(self) -> int:
        return self._ids.length

    def __repr__(self) -> str:
        return f"PrefixHandle({len(self)} tokens)"

    @property
    def tokens(self) -> Ints:
        """The ids, int64 [n]; a view that is valid until the next append."""
        return self._ids.view

    def append(self, token: int) -> None:
        """Adds one token id."""
        self._ids.append(token)
        self.lowest, self.highest = min(self.lowest, token), max(self.highest, token)

    def extend(self, tokens: "Sequence[int] | Ints | Tensor") -> None:
        """Adds token ids, [n]."""
        ids = as_ints(tokens)
        self._ids.extend(ids)
        if len(ids):
            # Kept up to date so that a scorer can check the range of a long prefix at once.
            self.lowest = min(self.lowest, int(ids.min()))
            self.highest = max(self.highest, int(ids.max()))

    def sync(self, tokens: "Sequence[int] | Ints | Tensor") -> None:
        """Makes the handle equal to `tokens`: appends what is new, resets on any other change."""
        ids, known = as_ints(tokens), len(self)
        if len(ids) < known or not np.array_equal(ids[:known], self.tokens):
            self.reset(ids)
        else:
            self.extend(ids[known:])

    def reset(self, tokens: "Sequence[int] | Ints | Tensor" = ()) -> None:
        """Forgets the history and starts again from `tokens`."""
        self._ids = GrowableInts()
        self.lowest = self.highest = 0
        self.version += 1
        self.extend(tokens)
