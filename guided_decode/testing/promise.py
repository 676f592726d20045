"""A promise of the contract, and the error that says that it was broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guided_decode.testing.bench import Bench


@dataclass(frozen=True, slots=True)
class Promise:
    """name: what `leave_out` takes. sentence: what is promised. check: raises `Broken`."""

    name: str
    sentence: str
    check: Callable[[Bench], None]


class Broken(Exception):
    """What a check found. rows: of the call that showed it."""

    def __init__(self, found: str, rows: Sequence[int] = ()) -> None:
        super().__init__(found)
        self.rows = tuple(rows)


class BrokenPromise(AssertionError):
    """A scorer that does not keep the contract; the text has the promise, the rows and the figures.

    promise: its name. rows: the rows of the call that showed it, as far as it was rows.
    """

    def __init__(self, promise: Promise, found: str, rows: Sequence[int] = ()) -> None:
        super().__init__(f"{promise.name}: {promise.sentence}. Found: {found}")
        self.promise = promise.name
        self.rows = tuple(rows)
