"""What one row asks of the next forward."""

from dataclasses import dataclass, replace

from guided_decode.growable import Ints


@dataclass(slots=True, frozen=True)
class RowWork:
    """What one row forwards: tokens of its prefix, then candidates after all of it.

    table_row: the row's slot table. first: position of the first prefix token that is forwarded.
    prefix, prefix_slots: int64 [n]. length: tokens of the whole prefix, the candidates'
    position. candidates, candidate_slots: int64 [m].
    """

    table_row: int
    first: int
    prefix: Ints
    prefix_slots: Ints
    length: int
    candidates: Ints
    candidate_slots: Ints

    @property
    def tokens(self) -> int:
        return len(self.prefix) + len(self.candidates)

    def cut(self, at: int) -> "tuple[RowWork, RowWork]":
        """The first `at` tokens of the work, and the rest."""
        head, rest = min(at, len(self.prefix)), max(0, at - len(self.prefix))
        before = replace(
            self,
            prefix=self.prefix[:head],
            prefix_slots=self.prefix_slots[:head],
            candidates=self.candidates[:rest],
            candidate_slots=self.candidate_slots[:rest],
        )
        after = replace(
            self,
            first=self.first + head,
            prefix=self.prefix[head:],
            prefix_slots=self.prefix_slots[head:],
            candidates=self.candidates[rest:],
            candidate_slots=self.candidate_slots[rest:],
        )
        return before, after
