"""What a page shows: prompts, their responses, and the steps of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.trace.steps import Step

Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Run:
    """One response.

    name: what it is called, "guided" say. ids: its token ids. pieces: the text that each token
    adds. steps: of its tokens. texts: of each step's tokens, as they would read there. after: the
    value after each token, in the scorer's units; None where there is none. guided: its tokens were
    drawn from the guided probabilities. visits: how often a tree search took each next token, by
    token id; empty where there was none. facts: what else is said of it, by name.
    """

    name: str
    ids: Sequence[int]
    pieces: Sequence[str]
    steps: Sequence[Step]
    texts: Sequence[Sequence[str]]
    after: Sequence[float | None]
    guided: bool = False
    visits: Sequence[Mapping[int, int]] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = [len(each) for each in (self.pieces, self.steps, self.texts, self.after)]
        if any(count != len(self.ids) for count in counts) or not self.ids:
            raise ValueError(
                f"pieces, steps, texts and after of {self.name!r} have {counts} entries: expected "
                f"one for each of its {len(self.ids)} tokens, and at least one token"
            )
        if self.visits and len(self.visits) != len(self.ids):
            raise ValueError(
                f"visits of {self.name!r} has {len(self.visits)} entries: expected one for each of "
                f"its {len(self.ids)} tokens, or none"
            )


@dataclass(frozen=True, slots=True)
class TracedPrompt:
    """A prompt and its responses.

    name: which prompt it is, "line 3" say; "" where there is one. messages: (role, text) of each.
    runs: its responses. method: of the search whose candidates they are; None: they stand beside
    each other. chosen: the one that the search chose.
    """

    name: str
    messages: Sequence[tuple[str, str]]
    runs: Sequence[Run]
    method: str | None = None
    chosen: int | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"prompt {self.name!r} came without a response: expected one or more")


@dataclass(frozen=True, slots=True)
class Trace:
    """All that a page shows.

    config: the guidance that the steps are of. decoding: how responses were drawn, by name; empty
    where they are others'. summed: a value is a sum of the tokens' own, as an implicit reward's is.
    """

    policy: str
    scorer: str
    config: GuidanceConfig
    prompts: Sequence[TracedPrompt]
    decoding: Mapping[str, Fact] = field(default_factory=dict)
    summed: bool = False
