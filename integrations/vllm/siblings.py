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
from guided_decode.integrations.vllm.request_ends import Pruning

_Key = tuple[Pruning, bytes]


class Sibling:
    """A live sample of a group; `boundary` is the length at which it last recorded.

    step: the last step that named it. is_fresh: it joined at its first token.
    """

    __slots__ = (
        "_hash", "_hashed", "boundary", "is_fresh", "is_pruned", "key", "pruning", "step",
    )  # fmt: skip

    def __init__(self, pruning: Pruning, key: _Key, step: int) -> None:
        self.pruning = pruning
        self.key = key
        self.step = step
        self.boundary = 0
        self.is_pruned = False
        self.is_fresh = False
        self._hash = blake2b(digest_size=16)
        self._hashed = 0

    def text(self, response: Ints, length: int) -> bytes:
        """What stands for the first `length` tokens; lengths only grow from call to call."""
        self._hash.update(response[self._hashed : length].tobytes())
        self._hashed = length
        return self._hash.copy().digest()


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
        self._step = 0

    def __len__(self) -> int:
        return len(self._groups)

    def begin_step(self, named: Iterable[Sibling], *, goes_on: bool = False) -> None:
        """A step begins, with these members in the batch.

        goes_on: the step has others, too, which came before.
        """
        self._step += not goes_on
        for sibling in named:
            sibling.step = self._step

    def join(self, pruning: Pruning, prompt: Ints, response: Ints) -> Sibling | None:
        """A new member, or None where its group is full.

        Args:
            pruning: what the request asked for; others of the prompt may ask for something else.
            prompt, response: int64 [tokens]; a response that is not empty comes back after a
                preemption, and takes over what it recorded before.
        """
        key = (pruning, blake2b(prompt.tobytes(), digest_size=16).digest())
        group = self._groups.setdefault(key, _Group())
        sibling = Sibling(pruning, key, self._step)
        if len(response):
            self._take_over(group, response, sibling)
        if not self._has_room(group, pruning, fresh=not len(response)):
            return None
        group.members.append(sibling)
        sibling.is_fresh = not len(response)
        group.joined += sibling.is_fresh
        return sibling

    def leave(self, sibling: Sibling) -> None:
        """Forgets a member that finished, was aborted, or waits after a preemption."""
        group = self._groups.get(sibling.key)
        if group is None or sibling not in group.members:
            return
        self._remove(group, sibling)
        if not group.members:
            del self._groups[sibling.key]

    @staticmethod
    def _remove(group: _Group, sibling: Sibling) -> None:
        group.members.remove(sibling)
        # Who never recorded anything leaves no trace.
        group.joined -= sibling.is_fresh and not sibling.boundary

    def _has_room(self, group: _Group, pruning: Pruning, *, fresh: bool) -> bool:
        # A runner that does not say who left keeps them as members that no step names.
        stale = [m for m in group.members if m.step != self._step and not m.boundary]
        if len(group.members) >= pruning.size and stale:
            self._remove(group, stale[0])
        if len(group.members) >= pruning.size:
            return False
        # Every fresh member may record at every boundary: no more of them than siblings.
        return not fresh or group.joined < pruning.size

    def _take_over(self, group: _Group, response: Ints, sibling: Sibling) -> None:
        """A sibling that came back gets the records of its text, whose owner left the batch."""
        for boundary in sorted(b for b in group.records if b <= len(response)):
            text = sibling.text(response, boundary)
            for record in group.records[boundary]:
                owner = record.sibling
                left = owner not in group.members or owner.step != self._step
                if record.text == text and left:
                    sibling.is_pruned |= owner.is_pruned
                    sibling.boundary = boundary
                    record.sibling = sibling
                    if owner in group.members:
                        group.members.remove(owner)
                    break

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
            if sibling.key not in self._groups:
                continue
            boundary = sibling.boundary = len(response)
            records = self._groups[sibling.key].records.setdefault(boundary, [])
            records.append(_Record(value, sibling.text(response, boundary), sibling))
            reached[sibling.key, boundary] = None
        return sum(self._prune(key[0], self._groups[key], boundary) for key, boundary in reached)

    @staticmethod
    def _prune(pruning: Pruning, group: _Group, boundary: int) -> int:
        # The sort is stable: of equal values the earlier ranks higher.
        ranked = sorted(group.records[boundary], key=lambda record: -record.value)
        outranked = [r.sibling for r in ranked[pruning.keep :] if not r.sibling.is_pruned]
        left = min(max(group.joined, len(group.members)), pruning.size) - group.pruned
        ended = outranked[::-1][: max(0, left - pruning.keep)]
        for sibling in ended:
            sibling.is_pruned = True
        group.pruned += len(ended)
        return len(ended)
