"""The keys of an ablation's file, and what each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guided_decode.cli.ablate.values import Hint, hints_of
from guided_decode.cli.config_file import Setting
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.guidance_options import GuidanceOptions
from guided_decode.cli.judge_options import JudgeOptions
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.search_options import BudgetOptions, MethodOptions
from guided_decode.lab.ablate.grid import GUIDE, PLAIN
from guided_decode.lab.ablate.outcomes import COUNTINGS
from guided_decode.search.method_table import METHODS

if TYPE_CHECKING:
    from guided_decode.cli.rollout_judges import RewardJudge

REWARDS = ("exact", "regex", "numeric", "math-verify", "function", "model")
EMBEDDED = ("tiny-tulu", "tiny-tulu-lists")
SPLITS = ("held-out", "validation")

Hints = Mapping[str, Hint]

PROMPTS: Hints = {
    "file": str,
    "embedded": str,
    "split": str,
    "skip": int,
    "limit": int,
    "raw": bool,
}
POLICY: Hints = {
    "model": str,
    "device": str,
    "dtype": str,
    "prompt_format": str,
    "trust_remote_code": bool,
    **hints_of(EngineOptions),
}
SCORER: Hints = {
    "model": str,
    "device": str,
    **hints_of(ScorerOptions, RemoteOptions, JudgeOptions),
}
REWARD: Hints = {
    "kind": str,
    "field": str,
    "find": str,
    "pattern": str,
    "tolerance": float,
    "function": str,
    **SCORER,
}
EQUAL_COST: Hints = {"budgets": list[float], "against": str}
# Of every method.
COMMON: Hints = {
    "method": str,
    "name": str,
    "policies": list[str],
    "scorers": list[str],
    "max_new_tokens": int,
}
_SEARCHED: Hints = {
    **hints_of(MethodOptions, BudgetOptions),
    "answer": str,
    "reference": str,
}
_GUIDED: Hints = {
    **hints_of(GuidanceOptions),
    "temperature": float,
    "config": str,
    "reference": str,
}
TOP = ("prompts", "output", "seeds", "block", "parallel", "max_new_tokens", "reward", "policies",
       "scorers", "methods", "equal_cost", "counting")  # fmt: skip
NAMES = (PLAIN, GUIDE, *METHODS)


def settings_of(method: str) -> Hints:
    """What may be said of a method, besides what may be of every one."""
    if method == PLAIN:
        return {"temperature": float}
    if method == GUIDE:
        return _GUIDED
    own = METHODS[method].settings
    limits = hints_of(BudgetOptions)
    return {
        name: hint for name, hint in _SEARCHED.items()
        if name in own or name in limits
        or (name == "answer" and METHODS[method].votes is not False)
        or (name == "reference" and "kl_coef" in own)
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """A policy, a scorer or a reward model: its name in the file, its line, and what is said."""

    label: str
    line: int
    model: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def group(self, kind: type) -> Any:
        """What is said of a group of options."""
        names = hints_of(kind)
        return kind(**{k: v for k, v in self.given.items() if k in names and v is not None})

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where none was given."""
        found = self.given.get(name)
        return default if found is None else found


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """An entry of `methods`. values: of each setting those that are tried, with their line."""

    method: str
    name: str
    line: int
    policies: tuple[str, ...] | None
    scorers: tuple[str, ...] | None
    values: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Reward:
    """What responses are worth. model: of kind "model"; line: of the section.

    judge: of the other kinds, from when the file was read on: its code is what it was then.
    """

    kind: str
    line: int
    given: Mapping[str, Any] = field(default_factory=dict)
    model: Model | None = None
    judge: RewardJudge | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where prompts come from. line: of the section."""

    line: int
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Ablation:
    """All that a file says, as far as it could be read. against_line: None where it says none."""

    prompts: Prompts | None = None
    output: str | None = None
    seeds: tuple[int, ...] = (0,)
    block: int = 50
    parallel: int = 1
    max_new_tokens: int = 256
    reward: Reward | None = None
    policies: dict[str, Model] = field(default_factory=dict)
    scorers: dict[str, Model] = field(default_factory=dict)
    methods: list[MethodEntry] = field(default_factory=list)
    budgets: tuple[float, ...] = ()
    against: str = "best-of-n"
    against_line: int | None = None
    counting: str = COUNTINGS[0]
