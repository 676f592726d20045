"""What a response is worth: an answer key, a pattern, a number, a program, or a reward model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from guided_decode.cli.ablate.pairs import check_scorer
from guided_decode.cli.ablate.schema import Model, Reward
from guided_decode.cli.ablate.words import in_keys
from guided_decode.cli.answer_option import AnswerFunction, read_answer
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.judge_options import JudgeOptions
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.rollout_judges import AnswerKey, FunctionJudge, RewardJudge
from guided_decode.cli.rollout_rows import RolloutRow
from guided_decode.cli.search_rows import SearchRow

_PLACE = "{answer}"


def checked_reward(reward: Reward) -> Reward:
    """The same with its judge, where it needs no model.

    Raises Refusal, ValueError or ImportError: there is no such reward.
    """
    if reward.model is not None:
        check_scorer(reward.model)
        return reward
    return replace(reward, judge=textual(reward))


def textual(reward: Reward) -> RewardJudge:
    """The reward of a program, which needs no model. Raises as `checked_reward`."""
    given = reward.given
    if reward.kind == "function":
        try:
            return FunctionJudge.of(given["function"])
        except Refusal as error:
            raise Refusal(str(error).replace("--judge", "function:")) from error
    if reward.kind == "exact":
        return AnswerKey(_found(given, AnswerFunction("text", _stripped, "text")))
    if reward.kind == "numeric":
        tolerance = given.get("tolerance") or 0.0
        if not 0.0 <= tolerance < float("inf"):
            raise Refusal(f"tolerance: {tolerance:g}: expected a number of at least 0")
        return NumericKey(_found(given, read_answer("final")), tolerance)
    if reward.kind == "regex":
        return PatternKey.of(given["pattern"])
    return MathKey.of()


def _found(given: Any, default: AnswerFunction) -> AnswerFunction:
    if given.get("find") is None:
        return default
    try:
        return read_answer(given["find"])
    except Refusal as error:
        raise Refusal(str(error).replace("--answer", "find:")) from error


def _stripped(text: str) -> str | None:
    return text.strip() or None


def rollout_row(row: SearchRow, reward: Reward, answer: Any) -> RolloutRow:
    """A prompt with its response, as judges of rewards read it. answer: as a unit keeps it."""
    key = row.passed.get(reward.given.get("field") or "answer")
    ended = answer["ended"] in ("eos", "stop")
    return RolloutRow(
        row.number, row.where, row.key, {**row.passed, "answer": key}, row.messages,
        response=answer["text"] or "", finished=ended,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class NumericKey:
    """1 where the number in a response is the line's, within a tolerance; else 0."""

    find: AnswerFunction
    tolerance: float

    @property
    def known_as(self) -> str:
        """What it is, for a reward's identity."""
        return f"numeric {self.find.known_as} {self.tolerance!r}"

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        """A number a row. Raises Refusal: the line's own answer is no number."""
        return [self._reward(row) for row in rows]

    def _reward(self, row: RolloutRow) -> float:
        key = str(row.given["answer"])
        wanted, found = _number(key), _number(self.find(row.response or ""))
        # A worked solution is a key as well as its number alone.
        wanted = _number(self.find(key)) if wanted is None else wanted
        if wanted is None:
            raise Refusal(f"{row.where}: the answer {key!r} has no number: expected one, or reward "
                          "of kind exact")  # fmt: skip
        if found is None:
            return 0.0
        return float(abs(found - wanted) <= self.tolerance * max(1.0, abs(wanted)))


def _number(text: Any) -> float | None:
    try:
        value = float(str(text).replace(",", ""))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


@dataclass(frozen=True, slots=True)
class PatternKey:
    """1 where a pattern is found in a response, with the line's answer in its place; else 0."""

    pattern: str

    @classmethod
    def of(cls, pattern: str) -> PatternKey:
        """Raises Refusal: it is no regular expression."""
        try:
            re.compile(pattern.replace(_PLACE, "x"))
        except re.error as error:
            raise Refusal(f"pattern: {pattern}: no regular expression ({error})") from error
        return cls(pattern)

    @property
    def known_as(self) -> str:
        """What it is, for a reward's identity."""
        return f"regex {self.pattern}"

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        """A number a row."""
        return [self._reward(row) for row in rows]

    def _reward(self, row: RolloutRow) -> float:
        own = re.escape(str(row.given["answer"]))
        return float(re.search(self.pattern.replace(_PLACE, own), row.response or "") is not None)


@dataclass(frozen=True, slots=True)
class MathKey:
    """1 where math-verify finds the line's answer in a response, however it is written; else 0."""

    parse: Callable[..., Any]
    verify: Callable[..., bool]
    version: str

    @classmethod
    def of(cls) -> MathKey:
        """Raises ImportError: the library is not there."""
        try:
            from importlib.metadata import version

            from math_verify import parse, verify
        except ImportError as error:
            raise ImportError(
                f"reward: kind math-verify needs the library of that name ({one_line(error)}): pip "
                "install 'guided-decode[math]'"
            ) from error
        return cls(parse, verify, version("math-verify"))

    @property
    def known_as(self) -> str:
        """What it is, for a reward's identity."""
        return f"math-verify {self.version}"

    def rewards(self, rows: Sequence[RolloutRow]) -> list[float]:
        """A number a row."""
        return [self._reward(row) for row in rows]

    def _reward(self, row: RolloutRow) -> float:
        # A bare answer is no mathematics to the parser, unless it is marked as such.
        key = str(row.given["answer"])
        gold = self.parse(key if "$" in key or "\\" in key else f"${key}$")
        return float(bool(self.verify(gold, self.parse(row.response or ""))))


def model_reward(model: Model, policy: Model, text_format: str | None, raw: bool) -> Any:
    """A reward model that reads a policy's responses, loaded as `train-critic` loads one."""
    from guided_decode.cli.engine_options import EngineOptions
    from guided_decode.cli.train_models import TrainModels
    from guided_decode.cli.train_options import RewardOptions

    models = TrainModels(
        policy.model, model.get("device") or policy.get("device"), policy.get("dtype", "auto"),
        text_format, raw, policy.group(EngineOptions), model.group(ScorerOptions),
        model.group(RemoteOptions), model.group(JudgeOptions),
    )  # fmt: skip
    return models, RewardOptions(reward_model=model.model)


def _judge(reward: Reward) -> RewardJudge:
    return textual(reward) if reward.judge is None else reward.judge


def reward_identity(reward: Reward, policy: Model, text_format: str | None, raw: bool) -> str:
    """What a policy's rewards follow from, by name; no model is loaded."""
    if reward.model is None:
        return _judge(reward).known_as
    models, options = model_reward(reward.model, policy, text_format, raw)
    return f"{models.judge_identity(options, ask=True)} {text_format} {raw}"


def open_reward(reward: Reward, policy: Model, text_format: str | None, raw: bool) -> RewardJudge:
    """Who judges a policy's responses. Raises Refusal or ValueError: it cannot be loaded."""
    if reward.model is None:
        return _judge(reward)
    models, options = model_reward(reward.model, policy, text_format, raw)
    try:
        return models.judge(options)
    except Refusal as error:
        raise Refusal(in_keys(str(error))) from error
