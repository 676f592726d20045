"""What an engine is asked for one by one: a continuation of one prefix, from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from guided_decode.search.requests import Continuation, Sampling, Tokens
from guided_decode.search.seeds import derive

T = TypeVar("T")
_NOTHING = Continuation((), (), "length")
# Temperatures that vLLM samples at; it would take what is lower for the lowest.
_LOWEST, _HIGHEST = 0.01, 2.0


@dataclass(frozen=True, slots=True)
class Draw:
    """One continuation that is wanted, of at least one token; as the local generator draws it."""

    prefix: Tokens
    max_tokens: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Draws:
    """All draws of a call. places: for each prefix, which of them its continuations are, in order;
    −1: no token is wanted. Greedy continuations of a prefix are one draw."""

    each: list[Draw]
    places: list[list[int]]

    @classmethod
    def of(
        cls,
        prefixes: Sequence[Sequence[int]],
        n: Sequence[int],
        max_tokens: Sequence[int],
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
    ) -> Draws:
        """The draws that `requests.Generator.extend` asks for.

        Raises ValueError: an empty prefix, a negative id, a temperature that engines do not have.
        """
        known: dict[Draw, int] = {}
        places = []
        rows = zip(prefixes, n, max_tokens, sampling, seeds, strict=True)
        for row, (prefix, count, most, how, seed) in enumerate(rows):
            ids = checked(prefix, row)
            if how.temperature and not _LOWEST <= how.temperature <= _HIGHEST:
                raise ValueError(
                    f"temperature={how.temperature}: engines have {_LOWEST} to {_HIGHEST}, and 0, "
                    "which is greedy"
                )
            own = []
            for number in range(count):
                greedy = how.temperature == 0
                draw = Draw(ids, most, how, 0 if greedy else derive(seed, number))
                own.append(known.setdefault(draw, len(known)) if most > 0 else -1)
            places.append(own)
        return cls(list(known), places)

    def answered(self, answers: Sequence[Continuation]) -> list[list[Continuation]]:
        """The continuations of each prefix, from those of `each`."""
        return [[_NOTHING if i < 0 else answers[i] for i in own] for own in self.places]


def checked(prefix: Sequence[int], row: int) -> Tokens:
    """The prefix. Raises ValueError: it is empty, or has what is no token id."""
    ids = tuple(map(int, prefix))
    if not ids:
        raise ValueError(f"row {row} has an empty prefix: expected at least one token id")
    if min(ids) < 0:
        raise ValueError(f"row {row} has token id {min(ids)}: expected ids of at least 0")
    return ids
