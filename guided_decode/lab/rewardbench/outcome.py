"""What came of the pairs: wins by subset, and how early in the response they are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from guided_decode.lab.intervals import wilson
from guided_decode.lab.rewardbench import protocol

# Of a response's tokens, rounded up.
FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """Scores of a pair's two responses, and its values after each of FRACTIONS of them."""

    subset: str
    chosen: float
    rejected: float
    chosen_prefixes: Sequence[float]
    rejected_prefixes: Sequence[float]


@dataclass(slots=True)
class Count:
    """Wins out of pairs; a tie is no win."""

    won: int = 0
    of: int = 0
    ties: int = 0

    def add(self, chosen: float, rejected: float) -> None:
        """Counts one pair."""
        self.won += chosen > rejected
        self.ties += chosen == rejected
        self.of += 1

    @property
    def accuracy(self) -> float:
        return self.won / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy (Wilson)."""
        return wilson(self.won, self.of)

    def as_dict(self) -> dict[str, float]:
        """By name, for JSON."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "low": low, "high": high, "won": self.won,
                "ties": self.ties, "pairs": self.of}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts by subset, and by fraction of the response over all pairs of the four sections."""

    subsets: dict[str, Count] = field(default_factory=dict)
    prefixes: dict[float, Count] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Outcome:
        """Counts pairs; their order changes nothing."""
        known = [name for name in protocol.SUBSETS if any(pair.subset == name for pair in pairs)]
        outcome = cls({name: Count() for name in known}, {part: Count() for part in FRACTIONS})
        for pair in pairs:
            outcome.subsets[pair.subset].add(pair.chosen, pair.rejected)
            if protocol.SUBSETS[pair.subset].section == protocol.PRIOR_SETS:
                continue
            sides = zip(FRACTIONS, pair.chosen_prefixes, pair.rejected_prefixes, strict=True)
            for part, chosen, rejected in sides:
                outcome.prefixes[part].add(chosen, rejected)
        return outcome

    @property
    def sections(self) -> dict[str, float]:
        """Scores of the sections that are whole."""
        return protocol.section_scores({n: count.accuracy for n, count in self.subsets.items()})

    @property
    def ties(self) -> int:
        return sum(count.ties for count in self.subsets.values())

    def as_dict(self) -> dict[str, object]:
        """All figures by name, for JSON; shares, not percent."""
        sections = self.sections
        return {
            "model_card": protocol.model_card_score(sections),
            "leaderboard": protocol.leaderboard_score(sections),
            "sections": sections,
            "subsets": {name: count.as_dict() for name, count in self.subsets.items()},
            "prefixes": {str(part): one.as_dict() for part, one in self.prefixes.items() if one.of},
            "ties": self.ties,
        }
