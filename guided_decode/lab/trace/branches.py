"""Responses that begin alike, as the tree that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branch:
    """A stretch of tokens that the same responses share.

    parent: the branch that it follows; None: it stands at the beginning. of: a response that has
    it, in which it is the tokens from begin to end (not included). ending: the responses that end
    with it.
    """

    parent: int | None
    of: int
    begin: int
    end: int
    ending: tuple[int, ...]


def branches(responses: Sequence[Sequence[int]]) -> list[Branch]:
    """The tree of responses, parents before children, in the order of the responses.

    responses: token ids, none of them empty. Equal ones share a branch to its end.
    """
    found: list[Branch] = []
    waiting: list[tuple[int | None, list[int], int]] = [(None, list(range(len(responses))), 0)]
    while waiting:
        parent, group, begin = waiting.pop()
        by_token: dict[int, list[int]] = {}
        for i in group:
            if len(responses[i]) > begin:
                by_token.setdefault(responses[i][begin], []).append(i)
        later = []
        for own in by_token.values():
            end = _shared(responses, own, begin)
            ending = tuple(i for i in own if len(responses[i]) == end)
            later.append((len(found), own, end))
            found.append(Branch(parent, own[0], begin, end, ending))
        waiting += reversed(later)
    return found


def _shared(responses: Sequence[Sequence[int]], group: Sequence[int], begin: int) -> int:
    """Up to where the group's responses are equal."""
    first, end = responses[group[0]], begin
    shortest = min(len(responses[i]) for i in group)
    while end < shortest and all(responses[i][end] == first[end] for i in group):
        end += 1
    return end
