"""Reads an ablation's file: what it says, and all that is wrong with it, by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guided_decode.cli.ablate import schema
from guided_decode.cli.ablate.schema import (
    Ablation,
    Hints,
    MethodEntry,
    Model,
    Prompts,
    Reward,
)
from guided_decode.cli.ablate.values import typed
from guided_decode.cli.config_file import Setting, unknown
from guided_decode.cli.yaml_lines import Problems, items_of, kind_of, read_mapping, value_of
from guided_decode.lab.ablate.outcomes import COUNTINGS

_LARGEST = 2**63 - 1
_EXPECTED = f"an ablation, with {', '.join(schema.TOP)} (guided-decode ablate --init shows one)"


def read_ablation(file: Path) -> tuple[Ablation, Problems]:
    """What a file says, and what is wrong with it.

    Raises:
        Refusal: it is no YAML, or no mapping.
        OSError: it cannot be read.
    """
    reader = _Reader()
    found = reader.ablation(read_mapping(file, _EXPECTED))
    return found, reader.problems


class _Reader:
    def __init__(self) -> None:
        self.problems: Problems = []

    def ablation(self, top: Any) -> Ablation:
        found = Ablation()
        readers = {
            "prompts": self._prompts, "reward": self._reward, "methods": self._methods,
            "policies": self._models, "scorers": self._models, "equal_cost": self._equal_cost,
        }  # fmt: skip
        seen = {}
        for name, node, line in items_of(top, self.problems):
            seen[name] = line
            if name not in schema.TOP:
                self.say(line, unknown(name, schema.TOP, "key"))
            elif name in readers:
                readers[name](found, name, node, line)
            else:
                self._plain(found, name, node, line)
        for needed in ("prompts", "reward", "policies", "methods"):
            if needed not in seen:
                self.say(1, f"no {needed}: expected them in the file")
        return found

    def say(self, line: int, problem: str) -> None:
        self.problems.append((line, problem))

    def _plain(self, found: Ablation, name: str, node: Any, line: int) -> None:
        hints = {"output": str, "counting": str, "seeds": list[int], "block": int, "parallel": int,
                 "max_new_tokens": int}  # fmt: skip
        value, problem = typed(name, value_of(node), hints[name])
        if not problem and name == "seeds":
            problem = "" if value and len(set(value)) == len(value) else (
                f"seeds: {value}: expected different integers, at least one"
            )  # fmt: skip
            if not problem and not all(-_LARGEST - 1 <= seed <= _LARGEST for seed in value):
                problem = f"seeds: {value}: expected integers of 64 bits, up to {_LARGEST}"
        elif not problem and name == "counting":
            problem = "" if value in COUNTINGS else unknown(str(value), COUNTINGS, "counting")
        elif not problem and name != "output" and not (value is not None and value >= 1):
            problem = f"{name}: {value}: expected an integer of at least 1"
        if problem:
            self.say(line, problem)
        elif value is not None:
            setattr(found, name, tuple(value) if name == "seeds" else value)

    def _fields(
        self, node: Any, line: int, hints: Hints, what: str
    ) -> Iterator[tuple[str, Any, int]]:
        """Name, value and line of each key that there is, of the right type."""
        if kind_of(node) != "map":
            self.say(line, f"{what}: expected keys below it, of {', '.join(hints)}")
            return
        for name, below, at in items_of(node, self.problems):
            if name not in hints:
                self.say(at, unknown(name, hints, f"key of {what}"))
                continue
            value, problem = typed(name, value_of(below), hints[name])
            if problem:
                self.say(at, problem)
            else:
                yield name, value, at

    def _prompts(self, found: Ablation, name: str, node: Any, line: int) -> None:
        given = {key: value for key, value, _ in self._fields(node, line, schema.PROMPTS, name)}
        found.prompts = Prompts(line, given)
        sources = [key for key in ("file", "embedded") if given.get(key) is not None]
        if len(sources) != 1:
            self.say(line, "prompts: expected a file, or embedded ones: one of the two")
        if given.get("embedded") not in (None, *schema.EMBEDDED):
            self.say(line, unknown(given["embedded"], schema.EMBEDDED, "embedded task"))
        if given.get("split") is not None and given["split"] not in schema.SPLITS:
            self.say(line, unknown(given["split"], schema.SPLITS, "split"))
        if given.get("split") is not None and "file" in sources:
            self.say(line, "prompts: split is of embedded ones, and a file came: drop it")
        for key, least in (("skip", 0), ("limit", 1)):
            if given.get(key) is not None and given[key] < least:
                self.say(line, f"prompts: {key}: {given[key]}: expected at least {least}")

    def _models(self, found: Ablation, name: str, node: Any, line: int) -> None:
        hints, what = (schema.POLICY, "policy") if name == "policies" else (schema.SCORER, "scorer")
        if kind_of(node) != "map":
            self.say(line, f"{name}: expected a {what} by name, such as NAME: MODEL")
            return
        into = found.policies if name == "policies" else found.scorers
        for label, below, at in items_of(node, self.problems):
            into[label] = self._model(label, below, at, hints, what)
        if not into:
            self.say(line, f"{name}: expected at least one")

    def _model(self, label: str, node: Any, line: int, hints: Hints, what: str) -> Model:
        if kind_of(node) == "map":
            given = {key: value for key, value, _ in self._fields(node, line, hints, what)}
        else:
            given = {"model": value_of(node)}
        if not isinstance(given.get("model"), str):
            self.say(line, f"{label}: expected a {what}'s name, or keys with model")
            given["model"] = ""
        return Model(label, line, str(given.pop("model")), given)

    def _reward(self, found: Ablation, name: str, node: Any, line: int) -> None:
        given = {key: value for key, value, _ in self._fields(node, line, schema.REWARD, name)}
        kind = given.pop("kind", None)
        if kind not in schema.REWARDS:
            self.say(line, "reward: " + unknown(str(kind), schema.REWARDS, "kind"))
            return
        wanted = {"regex": "pattern", "function": "function", "model": "model"}
        needed = wanted.get(kind)
        if needed and not given.get(needed):
            self.say(line, f"reward: kind {kind} needs {needed}")
            return
        own = {"exact": ("field", "find"), "numeric": ("field", "find", "tolerance"),
               "regex": ("field", "pattern"), "math-verify": ("field",),
               "function": ("function",)}.get(kind, tuple(schema.SCORER))  # fmt: skip
        for key in given:
            if key not in own:
                self.say(line, f"reward: {key} is not of kind {kind}, which has {', '.join(own)}")
        model = None
        if kind == "model":
            model = Model("reward", line, str(given["model"]),
                          {k: v for k, v in given.items() if k != "model"})  # fmt: skip
        found.reward = Reward(kind, line, given, model)

    def _equal_cost(self, found: Ablation, name: str, node: Any, line: int) -> None:
        given = {key: value for key, value, _ in self._fields(node, line, schema.EQUAL_COST, name)}
        found.budgets = tuple(given.get("budgets") or ())
        found.against = given.get("against") or found.against
        if not found.budgets or min(found.budgets) < 1:
            self.say(line, "equal_cost: expected budgets, multiples of the plain policy's tokens "
                     "of at least 1")  # fmt: skip
        found.against_line = line if given.get("against") else None

    def _methods(self, found: Ablation, name: str, node: Any, line: int) -> None:
        if kind_of(node) != "seq" or not node.value:
            self.say(line, "methods: expected a list of them, each with - method: NAME")
            return
        for entry in node.value:
            made = self._method(entry, entry.start_mark.line + 1)
            if made is not None:
                found.methods.append(made)

    def _method(self, node: Any, line: int) -> MethodEntry | None:
        if kind_of(node) == "str":
            if node.value in schema.NAMES:
                return MethodEntry(node.value, node.value, line, None, None, {})
            self.say(line, unknown(node.value, schema.NAMES, "method"))
            return None
        if kind_of(node) != "map":
            self.say(line, "methods: expected a name, or keys with method")
            return None
        items = list(items_of(node, self.problems))
        method = next((value_of(below) for key, below, _ in items if key == "method"), None)
        if method not in schema.NAMES:
            self.say(line, unknown(str(method), schema.NAMES, "method"))
            return None
        common: dict[str, Any] = {}
        values: dict[str, Setting] = {}
        own, sound = schema.settings_of(method), True
        for key, below, at in items:
            if key in schema.COMMON and key != "max_new_tokens":
                common[key], problem = typed(key, value_of(below), schema.COMMON[key])
            elif key in own or key == "max_new_tokens":
                values[key], problem = self._tried(key, below, at, {**schema.COMMON, **own}[key])
            else:
                problem = unknown(key, [*schema.COMMON, *own], f"setting of {method}")
            if problem:
                sound = False
                self.say(at, problem)
        if not sound:
            # What is left of it is another method's settings.
            return None
        return MethodEntry(
            method, common.get("name") or method, line, _labels(common, "policies"),
            _labels(common, "scorers"), values,
        )  # fmt: skip

    def _tried(self, name: str, node: Any, line: int, hint: Any) -> tuple[Setting, str]:
        """The values of a setting that are tried: a list is several."""
        given = value_of(node)
        # Of what is a list itself, a list of lists is several.
        several = isinstance(given, list) and (
            name != "stop" or bool(given and all(isinstance(each, list) for each in given))
        )
        listed = given if several else [given]
        pairs = [typed(name, each, hint) for each in listed]
        problem = next((said for _, said in pairs if said), "")
        if not listed:
            problem = f"{name}: an empty list: expected at least one value"
        values = [tuple(each) if isinstance(each, list) else each for each, _ in pairs]
        if not problem and len(dict.fromkeys(values)) < len(values):
            problem = f"{name}: {given}: a value came twice"
        return Setting(values, line), problem


def _labels(common: dict[str, Any], name: str) -> tuple[str, ...] | None:
    return None if common.get(name) is None else tuple(common[name])
