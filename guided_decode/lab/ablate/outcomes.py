"""What a setting did, response by response, and its means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from guided_decode.lab.ablate.grid import Setting

Floats = npt.NDArray[np.float64]
# Which of the policy's tokens are counted: see `Answer`.
COUNTINGS = ("forwarded", "drawn")


@dataclass(frozen=True, slots=True)
class Answer:
    """One response.

    text: None where the budget was spent before there was one. tokens: of it. ended: as of
    `search`: "eos", "length", "stop", "budget", "search"; or "abstained"; None: no response.
    log_prob: under the policy, in nats; kl: the divergence of its steps; bound: the most that its
    method diverges; None: not known. policy_tokens, scorer_tokens: distinct tokens that the models
    read or wrote for it; generated_tokens: drawn ones, each of them. calls: of the models, None
    where not counted.
    """

    text: str | None
    tokens: int
    ended: str | None
    stopped: str | None
    log_prob: float | None
    kl: float | None
    bound: float | None
    policy_tokens: int
    scorer_tokens: float
    generated_tokens: int
    prompt_tokens: int
    calls: int | None
    reward: float = 0.0

    @property
    def forwarded_tokens(self) -> float:
        """Of policy and scorer, where what draws have in common is forwarded once."""
        return self.policy_tokens + self.scorer_tokens

    @property
    def drawn_tokens(self) -> float:
        """Of policy and scorer, where draws share their prompt alone, as in most engines."""
        return self.prompt_tokens + self.generated_tokens + self.scorer_tokens

    @property
    def finished(self) -> bool:
        """Whether it came to its own end."""
        return self.ended in ("eos", "stop")


@dataclass(slots=True)
class Outcome:
    """All answers of a setting, by seed, in the prompts' order; seconds: of all, on the clock."""

    setting: Setting
    by_seed: dict[int, list[Answer]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def answers(self) -> list[Answer]:
        """All of them."""
        return [each for own in self.by_seed.values() for each in own]

    @property
    def rewards(self) -> Floats:
        """Of each prompt, the mean over the seeds, float64 [prompts]."""
        return self._by_prompt([[each.reward for each in own] for own in self.by_seed.values()])

    def total_tokens(self, counting: str) -> Floats:
        """Of policy and scorer, of each prompt, the mean over the seeds, float64 [prompts].

        counting: of `COUNTINGS`.
        """
        name = f"{counting}_tokens"
        return self._by_prompt([
            [getattr(each, name) for each in own] for own in self.by_seed.values()
        ])  # fmt: skip

    def mean(self, name: str) -> float:
        """The mean of a field or property of the answers."""
        return fmean(getattr(each, name) for each in self.answers)

    @property
    def seconds_per_answer(self) -> float:
        """On the clock."""
        return self.seconds / len(self.answers)

    def divergence(self) -> tuple[float | None, bool]:
        """Mean nats of a response from the policy, and whether that is exact; else it is at most
        so. None: nothing is known."""
        answers = [each for each in self.answers if each.text is not None]
        exact = _mean_of([each.kl for each in answers])
        if exact is not None:
            return exact, True
        bounds = [
            _mean_of([each.bound for each in answers]),
            _mean_of([None if each.log_prob is None else -each.log_prob for each in answers]),
        ]
        return min((each for each in bounds if each is not None), default=None), False

    def _by_prompt(self, rows: list[list[float]]) -> Floats:
        return np.asarray(rows, dtype=np.float64).mean(axis=0)


def _mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None where there is none, or one of them is not known."""
    known = [each for each in values if each is not None]
    return fmean(known) if known and len(known) == len(values) else None


def answer_of(stored: Mapping[str, Any], reward: float) -> Answer:
    """An answer as a unit keeps it (`Answer`'s fields but for the reward), with its reward."""
    return Answer(**stored, reward=reward)
