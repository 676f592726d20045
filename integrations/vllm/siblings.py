"""Pruning of siblings: asynchronous successive halving over the samples of one prompt.

At each boundary of `every` tokens a sibling records V(prefix). It is ended as soon as `keep`
siblings have recorded a higher V at that boundary, and nobody waits for anybody (ASHA:
Li et al., arXiv 1810.05934; there a rung promotes, here it ends). The last `keep` are never ended:
those that end a sibling at one boundary may themselves be ended at another.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from guided_decode.growable import Ints
from guided_decode.integrations.vllm.request import Pruning

_Key = tuple[Pruning, bytes]


@dataclass(slots=True, eq=False)
class Sibling:
    """A live sample of a group; `boundary` is the length at which it last recorded."""

    pruning: Pruning
    key: _Key
    boundary: int = 0
    is_pruned: bool = False


class Arrival(NamedTuple):
    """A sibling at a boundary: its response so far, int64 [tokens], and V(prefix)."""

    sibling: Sibling
    response: Ints
    value: float


@dataclass(slots=True)
class _Record:
    value: float
    text: bytes
    sibling: Sibling


@dataclass(slots=True)
class _Group:
    members: list[Sibling] = field(default_factory=list)
    joined: int = 0
    pruned: int = 0
    # By boundary, in order of arrival.
    records: dict[int, list[_Record]] = field(default_factory=dict)


class SiblingGroups:
    """The groups of an engine. A group is one prompt's: its state dies with its last member."""

    def __init__(self) -> None:
        self._groups: dict[_Key, _Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def join(self, pruning: Pruning, prompt: Ints, response: Ints) -> Sibling | None:
        """A new member, or None where its group is full.

        Args:
            pruning: what the request asked for; others of the prompt may ask for something else.
            prompt, response: int64 [tokens]; a response that is not empty comes back after a
                preemption, and takes over what it recorded before.
        """
        key = (pruning, _digest(prompt))
        group = self._groups.setdefault(key, _Group())
        if len(group.members) >= pruning.size:
            return None
        sibling = Sibling(pruning, key)
        group.members.append(sibling)
        group.joined += not len(response)
        for boundary in range(pruning.every, len(response) + 1, pruning.every):
            self._take_over(group, boundary, _digest(response[:boundary]), sibling)
        return sibling

    def leave(self, sibling: Sibling) -> None:
        """Forgets a member that finished, was aborted, or waits after a preemption."""
        group = self._groups.get(sibling.key)
        if group is None or sibling not in group.members:
            return
        group.members.remove(sibling)
        if not group.members:
            del self._groups[sibling.key]

    @staticmethod
    def is_due(sibling: Sibling, length: int) -> bool:
        """Whether a response of this length is at a boundary that it has not recorded."""
        return length > 0 and length % sibling.pruning.every == 0 and length != sibling.boundary

    def record(self, arrivals: Iterable[Arrival]) -> int:
        """Records the arrivals of one step together, then prunes those that rank too low.

        Returns how many were pruned.
        """
        reached: dict[tuple[_Key, int], None] = {}
        for sibling, response, value in arrivals:
            boundary = sibling.boundary = len(response)
            records = self._groups[sibling.key].records.setdefault(boundary, [])
            records.append(_Record(value, _digest(response), sibling))
            reached[sibling.key, boundary] = None
        return sum(self._prune(key[0], self._groups[key], boundary) for key, boundary in reached)

    @staticmethod
    def _prune(pruning: Pruning, group: _Group, boundary: int) -> int:
        # The sort is stable: of equal values the earlier ranks higher.
        ranked = sorted(group.records[boundary], key=lambda record: -record.value)
        outranked = [r.sibling for r in ranked[pruning.keep :] if not r.sibling.is_pruned]
        left = min(group.joined, pruning.size) - group.pruned
        ended = outranked[::-1][: max(0, left - pruning.keep)]
        for sibling in ended:
            sibling.is_pruned = True
        group.pruned += len(ended)
        return len(ended)

    @staticmethod
    def _take_over(group: _Group, boundary: int, text: bytes, sibling: Sibling) -> None:
        for record in group.records.get(boundary, ()):
            if record.text == text and record.sibling not in group.members:
                sibling.is_pruned |= record.sibling.is_pruned
                record.sibling = sibling
                sibling.boundary = boundary
                return


def _digest(tokens: Ints) -> bytes:
    return blake2b(tokens.tobytes(), digest_size=16).digest()
