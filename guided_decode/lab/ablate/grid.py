"""The grid of an ablation: settings, each over all prompts and seeds, in units of a few prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Methods of single tokens; the others are searches, by the names of `search.METHODS`.
PLAIN, GUIDE = "plain", "guide"


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell: a method with all its settings, on a policy, with a scorer.

    policy, scorer: the names that the config gives them; no scorer where the method asks none.
    name: of the method, in tables. given: what the config says of it, by name. swept: which of
    these differ between cells of one method. draws: whether a seed changes anything.
    own_length: whether its longest response is another than the config's.
    """

    policy: str
    scorer: str | None
    method: str
    name: str
    given: Mapping[str, Any]
    swept: tuple[str, ...] = ()
    draws: bool = True
    own_length: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is what others are compared with: the policy at temperature 1, of responses as
        long as the config says."""
        at_one = self.given.get("temperature", 1.0) == 1.0
        return self.method == PLAIN and at_one and not self.own_length

    @property
    def curve(self) -> str:
        """What it is called with its siblings, which differ in what is swept alone."""
        return self.name if self.scorer is None else f"{self.name}, {self.scorer}"

    @property
    def values(self) -> str:
        """What tells it from its siblings, in words; "" where it has none."""
        return ", ".join(f"{name} {shown(self.given.get(name))}" for name in self.swept)

    @property
    def label(self) -> str:
        """Its own name among all of its policy."""
        return f"{self.curve} ({self.values})" if self.values else self.curve


@dataclass(frozen=True, slots=True)
class Unit:
    """A setting with one seed on prompts first ... first + count: what is computed in one go.

    key: of all that decides what comes of it.
    """

    setting: Setting
    seed: int
    first: int
    count: int
    key: str

    @property
    def rows(self) -> range:
        """The prompts' places."""
        return range(self.first, self.first + self.count)


def blocks(prompts: int, size: int) -> Iterator[tuple[int, int]]:
    """First and count of each block of prompts."""
    for first in range(0, prompts, size):
        yield first, min(size, prompts - first)


def products(given: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of one value of each, the last name's values changing fastest."""
    for values in itertools.product(*given.values()):
        yield dict(zip(given, values, strict=True))


def shown(value: Any) -> str:
    """A setting's value as tables show it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " ".join(repr(each) for each in value)
    return "none" if value is None else str(value)
