"""Prefix handles: token histories that a scorer looks up by their new tokens only."""

import copy
import itertools
import operator
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from guided_decode.growable import GrowableInts, Ints

_serials = itertools.count()
_HIGHEST = np.iinfo(np.int64).max
# Of so many of its last changes a handle knows what each left of it.
_KEPT = 8
_EXPECTED = "expected one dimension of integer token ids, without padding"


def as_ints(tokens: "Sequence[int] | Ints | Tensor") -> Ints:
    """Token ids as int64 [n]; a tensor may live on any device.

    Raises ValueError: anything but integers in one dimension.
    """
    if isinstance(tokens, Tensor):
        # numpy has no bfloat16, and its own words for that.
        floats = tokens.is_floating_point() or tokens.is_complex()
        tokens = (tokens.double() if floats else tokens).detach().cpu().numpy()
    try:
        array = np.asarray(tokens)
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"a prefix came as {type(tokens).__name__}: {_EXPECTED}") from error
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"a prefix came as {array.dtype} with shape {list(array.shape)}: {_EXPECTED}"
        )
    if array.dtype == np.uint64 and array.size and int(array.max()) > _HIGHEST:
        raise ValueError(f"token id {int(array.max())} is beyond int64: {_EXPECTED}")
    return array.astype(np.int64, copy=False)


def _as_int(token: int) -> int:
    """One token id; numpy's integers and tensors of one are integers too."""
    try:
        index = operator.index(token)
    except TypeError:
        raise ValueError(f"token id {token!r} is no integer: expected one token id") from None
    if not -_HIGHEST - 1 <= index <= _HIGHEST:
        raise ValueError(f"a token id of {index.bit_length()} bits is beyond int64: expected one")
    return index


class HandleState(NamedTuple):
    """What a handle held at one moment: tokens, int64 [n], stay so whatever is appended since.

    lowest, highest: bounds of the ids, 0 among them. version: grows with each `reset` and `rewind`.
    """

    tokens: Ints
    lowest: int
    highest: int
    version: int


class PrefixHandle:
    """The token history of one request: unpadded ids, prompt first, that only grow.

    A scorer remembers where the handle stood in its cache, so that a look-up verifies only the
    tokens appended since. Handing over a list that shrank or changed (`sync`) resets the handle:
    the answer stays right, the next look-up is a full one. Threads may share one: each change is
    whole, and a scorer reads the history as it is at one moment. A copy has a history of its own.
    """

    __slots__ = (
        "__weakref__", "_ids", "_kept", "_lock", "_tip", "highest", "lowest", "serial", "version",
    )  # fmt: skip

    def __init__(self, tokens: "Sequence[int] | Ints | Tensor" = ()) -> None:
        # A number that no other handle of the process has had.
        self.serial = next(_serials)
        self.version = 0
        self.lowest = self.highest = 0
        self._ids = GrowableInts()
        # Of the last changes, newest last: the tokens that each left as they were.
        self._kept: list[int] = []
        self._lock = threading.RLock()
        self.extend(tokens)

    def __len__(self) -> int:
        return self._ids.length

    def __repr__(self) -> str:
        return f"PrefixHandle({len(self)} tokens)"

    def __copy__(self) -> "PrefixHandle":
        return type(self)(self.tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefixHandle":
        return memo.setdefault(id(self), copy.copy(self))

    def __reduce__(self) -> tuple[type["PrefixHandle"], tuple[Ints]]:
        return type(self), (self.tokens.copy(),)

    @property
    def tokens(self) -> Ints:
        """The ids, int64 [n]; a view that is valid until the next append."""
        return self._ids.view

    def state(self) -> HandleState:
        """The history and what is known of it, at one moment."""
        with self._lock:
            return HandleState(self._ids.view, self.lowest, self.highest, self.version)

    def tip(self) -> tuple[int, int, int]:
        """Length, last token (-1 of none) and version, at one moment."""
        # Set whole by each change: a scorer asks for one a row and step.
        return self._tip

    def append(self, token: int) -> None:
        """Adds one token id.

        Raises ValueError: it is no integer, or beyond int64.
        """
        if type(token) is not int or not -_HIGHEST <= token <= _HIGHEST:
            token = _as_int(token)
        with self._lock:
            if token > self.highest:
                self.highest = token
            elif token < self.lowest:
                self.lowest = token
            self._ids.append(token)
            self._tip = (self._ids.length, token, self.version)

    def extend(self, tokens: "Sequence[int] | Ints | Tensor") -> None:
        """Adds token ids, [n]."""
        ids = as_ints(tokens)
        with self._lock:
            if len(ids):
                # Kept up to date so that a scorer can check the range of a long prefix at once;
                # first, so that an interruption leaves no id outside of them.
                self.lowest = min(self.lowest, int(ids.min()))
                self.highest = max(self.highest, int(ids.max()))
            self._ids.extend(ids)
            self._tip = (self._ids.length, self._ids.last, self.version)

    def sync(self, tokens: "Sequence[int] | Ints | Tensor") -> None:
        """Makes the handle equal to `tokens`: appends what is new, resets on any other change."""
        ids = as_ints(tokens)
        with self._lock:
            known = len(self)
            if len(ids) < known or not np.array_equal(ids[:known], self.tokens):
                self.reset(ids)
            else:
                self.extend(ids[known:])

    def reset(self, tokens: "Sequence[int] | Ints | Tensor" = ()) -> None:
        """Forgets the history and starts again from `tokens`."""
        ids = as_ints(tokens)
        with self._lock:
            self._ids = GrowableInts()
            self.lowest = self.highest = 0
            self._changed(0)
            self.extend(ids)

    def rewind(self, length: int) -> None:
        """Forgets what is behind the first `length` tokens; a scorer's look-up goes on from there.

        For a history whose end was a guess. Views and states that were taken before are no longer
        valid: no other thread may be reading the handle.

        Raises ValueError: it has fewer tokens.
        """
        with self._lock:
            if not 0 <= length <= len(self):
                raise ValueError(
                    f"rewind({length}) of a handle with {len(self)} tokens: expected a length "
                    "from 0 to that"
                )
            if length == len(self):
                return
            dropped = self._ids.truncate(length)
            if self.lowest in dropped or self.highest in dropped:
                left = self._ids.view
                self.lowest = min(0, int(left.min(initial=0)))
                self.highest = max(0, int(left.max(initial=0)))
            self._changed(length)
            self._tip = (length, self._ids.last, self.version)

    def kept(self, version: int) -> int:
        """How many of the first tokens are as they were at this version; 0 where nobody knows."""
        with self._lock:
            changes = self.version - version
            if not 0 <= changes <= len(self._kept):
                return 0
            return min([len(self), *self._kept[len(self._kept) - changes :]])

    def _changed(self, kept: int) -> None:
        self.version += 1
        self._kept = [*self._kept[1 - _KEPT :], kept]
