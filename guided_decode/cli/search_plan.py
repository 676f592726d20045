"""What `search` does for each prompt, from its options, whichever models answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from guided_decode.checkpoints.record import Record
from guided_decode.cli.answer_option import AnswerFunction, read_answer
from guided_decode.cli.errors import Refusal
from guided_decode.cli.search_options import BudgetOptions, MethodOptions
from guided_decode.search.budget import Budget
from guided_decode.search.method_table import NEEDED, Method, find_method

# Where a vote names no function: what is boxed, or announced, or the last number.
_DEFAULT_ANSWER = "final"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is searched for each prompt, whoever answers. settings: of the method, those given."""

    method: Method
    settings: dict[str, Any]
    max_tokens: int
    budget: Budget
    seed: int
    answer: AnswerFunction | None

    def ending(self, policy: Record | None) -> Plan:
        """The same, where responses of a known policy end at strings, if nothing else was said.

        Raises Refusal: stop strings are to end responses, and there are none.
        """
        ends = () if policy is None else policy.stop
        if not ends or "stop" in self.settings or self.method.settings.get("stop") != ():
            if self.settings.get("stop_ends") and not self.method.checked(self.settings)["stop"]:
                raise Refusal("--stop-ends came without --stop, the text that ends a response")
            return self
        own: dict[str, Any] = {"stop": ends}
        if "stop_ends" in self.method.settings:
            own["stop_ends"] = True
        return replace(self, settings={**own, **self.settings})

    def identity(self) -> dict[str, Any]:
        """From what a line follows, by name."""
        return {
            "method": self.method.name,
            "settings": sorted(self.method.checked(self.settings).items()),
            "max_tokens": self.max_tokens,
            "budget": asdict(self.budget),
            "seed": self.seed,
            "answer": None if self.answer is None else self.answer.known_as,
        }


def read_plan(
    name: str,
    settings: MethodOptions,
    answer: str | None,
    max_tokens: int | None,
    limits: BudgetOptions,
    seed: int,
) -> Plan:
    """The plan of a command line.

    Raises Refusal or ValueError: there is no such method, it has not that setting, or the setting
    has no meaning.
    """
    method, given = find_method(name), settings.given()
    if answer is not None and method.votes is False:
        raise Refusal(f"--answer {answer} came with --method {name}, which takes no vote: drop it")
    if answer is None and method.votes:
        answer = _DEFAULT_ANSWER
    function = None if answer is None else read_answer(answer)
    most = method.max_tokens if max_tokens is None else max_tokens
    # What is refused is refused before models are loaded: where a method looks at its settings,
    # which is before its first request.
    vote = None if function is None else lambda tokens: None
    trial = method.begin((0,), max_tokens=most, answer=vote, **given)
    next(trial)
    trial.close()
    return Plan(method, given, most, limits.budget(), seed, function)


def print_settings(name: str) -> None:
    """The settings of a method as they are typed, with their defaults."""
    method = find_method(name)
    print(f"{method.name}: {method.summary}")
    for setting, default in {**method.settings, "max_new_tokens": method.max_tokens}.items():
        shown = "needed" if default is NEEDED else json.dumps(default)
        print(f"  --{setting.replace('_', '-'):<20} {'none' if default in (None, ()) else shown}")
    if method.votes is not False:
        print(f"  --{'answer':<20} {_DEFAULT_ANSWER if method.votes else 'none'}")
