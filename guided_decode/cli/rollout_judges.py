"""Who says what a response is worth: a function of the user's, an answer key, a reward model."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from guided_decode.cli.answer_option import AnswerFunction, import_function, source_of
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.rollout_rows import RolloutRow
from guided_decode.cli.score_run import lines_of
from guided_decode.critics.rollout import Rollout
from guided_decode.search.requests import Judged

if TYPE_CHECKING:
    from guided_decode.cli.search_judges import AnyJudge, Tell

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class RewardJudge(Protocol):
    """Values whole responses."""

    @property
    def known_as(self) -> str:
        """What it is, for a run's identity."""
        ...

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        """A finite number a row, which has its response. Raises Refusal: names the prompt."""
        ...


@dataclass(frozen=True, slots=True)
class FunctionJudge:
    """A function of prompt and response, MODULE:FUNCTION."""

    name: str
    function: Callable[[Any, str], Any]
    known_as: str

    @classmethod
    def of(cls, name: str) -> FunctionJudge:
        """Raises Refusal: there is no such function."""
        function = import_function(name, "--judge", "a function of prompt and response")
        return cls(name, function, f"{name} {source_of(name, function)}")

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        return [self._reward(row) for row in rows]

    def _reward(self, row: RolloutRow) -> float:
        try:
            given = self.function(row.prompt, row.response or "")
        except Exception as error:
            # It is the user's own: it raises what it likes.
            raise Refusal(f"--judge {self.name} raised {type(error).__name__} "
                          f"({one_line(error)}) {_about(row)}") from error  # fmt: skip
        return _number(given, f"--judge {self.name} returned", row)


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """1 where the answer in a response is the one of its line's `answer`, else 0."""

    find: AnswerFunction

    @property
    def known_as(self) -> str:
        return f"answer {self.find.known_as}"

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        return [self._reward(row) for row in rows]

    def _reward(self, row: RolloutRow) -> float:
        key = row.passed.get("answer")
        if not isinstance(key, str | int | float) or isinstance(key, bool):
            what = "no answer" if key is None else f"the answer {key!r}"
            raise Refusal(f"{row.where}: {what}: expected text or a number as answer, which "
                          "--answer compares")  # fmt: skip
        found = self.find(row.response or "")
        # A worked solution is a key as well as its answer alone.
        wanted = self.find(str(key))
        wanted = str(key).strip() if wanted is None else wanted
        return float(found is not None and found == wanted)


@dataclass(frozen=True, slots=True)
class ModelJudge:
    """A scorer that says what the end of a response is worth."""

    name: str
    judge: AnyJudge
    tell: Tell | None
    reader: RolloutReader
    known_as: str

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        rollouts = [self.reader.rollout(row) for row in rows]
        if self.tell is not None:
            for row, rollout in zip(rows, rollouts, strict=True):
                self.tell(list(rollout.prompt), row.messages)
        found = self.judge.judge([_judged(each) for each in rollouts])
        return [
            _number(value, f"{self.name} says", row) for value, row in zip(found, rows, strict=True)
        ]


def _judged(rollout: Rollout) -> Judged:
    return Judged(rollout.prompt, rollout.response, rollout.finished)


@dataclass(frozen=True, slots=True)
class JudgingJob:
    """How responses get their rewards. run: what these follow from, by name."""

    judge: RewardJudge
    reader: RolloutReader
    run: str

    def lines(self, batch: list[RolloutRow]) -> Iterator[list[dict[str, Any]]]:
        """The batch's lines; one by one where one gets no reward. Raises Refusal: names it."""
        return lines_of(batch, self._judged, self._failed)

    def _judged(self, batch: list[RolloutRow]) -> list[dict[str, Any]]:
        rewards = self.judge.rewards([self.reader.with_texts(row) for row in batch])
        return [
            {**row.given, "reward": reward, "key": row.key, "run": self.run}
            for row, reward in zip(batch, rewards, strict=True)
        ]

    def _failed(self, row: RolloutRow, error: Exception) -> dict[str, Any]:
        raise error


def _number(given: Any, who: str, row: RolloutRow) -> float:
    """A reward. Raises Refusal: it is text, None, NaN or infinite."""
    try:
        # numpy's and torch's numbers are numbers; text that looks like one is none.
        value = math.nan if isinstance(given, str | bytes | None) else float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise Refusal(f"{who} {_SHORT.repr(given)} {_about(row)}: expected a finite number")
    return value


def _about(row: RolloutRow) -> str:
    return f"for the prompt {_SHORT.repr(row.prompt)} ({row.where})"
