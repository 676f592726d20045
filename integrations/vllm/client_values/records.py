"""What is known of one step of a row, and what becomes of that once its token is chosen."""

import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

_FLOAT32 = struct.Struct("f")


class Record(NamedTuple):
    """V of a text, and the advantages of the candidates behind it.

    text: its digest. value: NaN where it was not read. tokens: int64 [k]. advantages: float32 [k],
    Q(s,a) − V(s). Both as bytes: they wait in the worker, and go to another process. final: whether
    the row's next token was chosen in this step; else it may come again and read more.
    """

    text: bytes
    value: float
    tokens: bytes
    advantages: bytes
    final: bool

    @property
    def size(self) -> int:
        """Bytes that it takes, about; Python's own objects are counted."""
        return 300 + len(self.tokens) + len(self.advantages)

    def advantage(self, token: int) -> float | None:
        """Of this candidate; None where it was not scored."""
        # Of so few the bytes are searched faster than an array is made of them.
        wanted = token.to_bytes(8, sys.byteorder, signed=True)
        at = self.tokens.find(wanted)
        while at % 8 and at >= 0:
            at = self.tokens.find(wanted, at + 1)
        return None if at < 0 else _FLOAT32.unpack_from(self.advantages, at // 2)[0]


_DECODER = msgspec.msgpack.Decoder(dict[str, list[Record]])


def record(
    text: bytes, value: float | None, advantages: Mapping[int, float], *, final: bool = True
) -> Record:
    """A record; what is no finite number is left out. advantages: by token id."""
    finite = {token: each for token, each in advantages.items() if math.isfinite(each)}
    return Record(
        text,
        value if value is not None and math.isfinite(value) else math.nan,
        np.array(list(finite), np.int64).tobytes(),
        np.array(list(finite.values()), np.float32).tobytes(),
        final,
    )


def encoded(records: Mapping[str, Sequence[Record]]) -> bytes:
    """Records by the names of their requests, for another process."""
    return msgspec.msgpack.encode(records)


def decoded(data: bytes) -> dict[str, list[Record]]:
    """What `encoded` wrote; of nothing, nothing."""
    return _DECODER.decode(data) if data else {}


def merged(one: Record, other: Record) -> Record:
    """All that two records of one text know: V and an advantage depend on nothing but the text."""
    tokens, advantages = one.tokens, one.advantages
    if other.tokens != tokens:
        ids = np.frombuffer(other.tokens, np.int64)
        new = ~np.isin(ids, np.frombuffer(tokens, np.int64))
        tokens += ids[new].tobytes()
        advantages += np.frombuffer(other.advantages, np.float32)[new].tobytes()
    value = other.value if math.isnan(one.value) else one.value
    return Record(one.text, value, tokens, advantages, one.final or other.final)


class Known:
    """The records of one request, by text. Samples that begin alike share them."""

    def __init__(self) -> None:
        self._records: dict[bytes, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Sequence[Record]) -> None:
        for each in records:
            found = self._records.get(each.text)
            self._records[each.text] = each if found is None else merged(found, each)

    def lacks(self, texts: Sequence[bytes], tokens: Sequence[int]) -> bool:
        """Whether the worker may know more of one of these tokens, each behind its text."""
        return not all(map(self._is_whole, texts, tokens))

    def _is_whole(self, text: bytes, token: int) -> bool:
        found = self._records.get(text)
        if found is None:
            return False
        if found.tokens:
            # A sibling's candidates may differ by rounding, and its record be under way.
            return found.advantage(token) is not None
        return found.final

    def forget(self, texts: Iterable[bytes]) -> None:
        """Nobody asks for these any more."""
        for text in texts:
            self._records.pop(text, None)

    def absent(self, texts: Sequence[bytes]) -> int:
        """How many of these have no record."""
        return sum(text not in self._records for text in texts)

    def get(self, text: bytes) -> Record | None:
        return self._records.get(text)


class TokenValues(NamedTuple):
    """Of each token of a response, or of a piece of it: as `GuidedOutput` of Hugging Face's side.

    prefix_values: V of the text before the token; None where it was not read.
    advantages: what the token added, Q(s,a) − V(s), 0 for a terminal to which the critic's terminal
        rule gives none; None where it was not scored.
    """

    prefix_values: list[float | None]
    advantages: list[float | None]


def token_values(known: Known, texts: Sequence[bytes], tokens: Sequence[int]) -> TokenValues:
    """What is known of tokens that came after these texts."""
    values: list[float | None] = []
    advantages: list[float | None] = []
    for text, token in zip(texts, tokens, strict=True):
        found = known.get(text)
        unread = found is None or math.isnan(found.value)
        values.append(None if found is None or unread else found.value)
        advantages.append(None if found is None else found.advantage(token))
    return TokenValues(values, advantages)
