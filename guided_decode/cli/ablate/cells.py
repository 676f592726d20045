"""From an ablation's entries to the cells of its grid, and what of them cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from guided_decode.checkpoints.registry import find
from guided_decode.cli.ablate import pairs
from guided_decode.cli.ablate.cell import Cell, TokenPlan
from guided_decode.cli.ablate.schema import (
    NAMES,
    Ablation,
    MethodEntry,
    Model,
)
from guided_decode.cli.ablate.words import in_keys
from guided_decode.cli.chats import format_of
from guided_decode.cli.config_file import GUIDANCE, read_config, unknown
from guided_decode.cli.decoding import Sampling
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.guidance_options import GuidanceOptions
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.search_models import named
from guided_decode.cli.search_options import BudgetOptions, MethodOptions
from guided_decode.cli.search_plan import Plan, read_plan
from guided_decode.cli.yaml_lines import Problems
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.ablate.grid import GUIDE, PLAIN, Setting, products
from guided_decode.search.method_table import METHODS

_DEFAULT = GuidanceConfig()


def cells_of(ablation: Ablation, problems: Problems) -> list[Cell]:
    """All cells, those of each policy together; what cannot be is added to the problems."""
    maker = _Maker(ablation, problems)
    sound = maker.sound_models()
    entries = list(ablation.methods)
    made = [cell for entry in entries for cell in maker.cells(entry, sound)]
    has_plain = {cell.policy.label for cell in made if cell.setting.is_plain}
    lacking = tuple(label for label in ablation.policies if label not in has_plain)
    if lacking:
        # What all is compared with.
        plain = MethodEntry(PLAIN, PLAIN, 1, lacking, None, {})
        entries.insert(0, plain)
        made = [*maker.cells(plain, sound), *made]
    order = list(ablation.policies)
    found = sorted(made, key=lambda cell: order.index(cell.policy.label))
    _refuse_alike(found, entries, problems)
    curves = dict.fromkeys(name for e in entries for name in (
        e.name, *(cell.setting.curve for cell in found if cell.setting.name == e.name)
    ))  # fmt: skip
    # A method that is not of this grid is one that nothing of fits: plain stands for it.
    known = ablation.against in curves or ablation.against in NAMES
    if ablation.against_line is not None and not known:
        problems.append((ablation.against_line, "equal_cost: against: "
                         + unknown(ablation.against, curves, "method")))  # fmt: skip
    return found


def _refuse_alike(found: list[Cell], entries: list[MethodEntry], problems: Problems) -> None:
    seen: set[tuple[str, str]] = set()
    for cell in found:
        own = (cell.policy.label, cell.setting.label)
        if own in seen:
            line = next(e.line for e in reversed(entries) if e.name == cell.setting.name)
            problems.append((line, f"{cell.setting.label} comes twice on {own[0]}: give one of "
                             "them another name"))  # fmt: skip
        seen.add(own)


class _Maker:
    def __init__(self, ablation: Ablation, problems: Problems) -> None:
        self.ablation, self.problems = ablation, problems
        self._said = set(problems)

    def say(self, line: int, problem: str) -> None:
        """Once, however many cells it is of."""
        if (line, problem) not in self._said:
            self._said.add((line, problem))
            self.problems.append((line, problem))

    def sound_models(self) -> set[str]:
        """The policies and scorers that nothing is wrong with by themselves; says the others'."""
        sound = set()
        for kind, check in (("policies", pairs.check_policy), ("scorers", pairs.check_scorer)):
            for label, model in getattr(self.ablation, kind).items():
                try:
                    check(model)
                    sound.add(f"{kind} {label}")
                except (Refusal, ValueError, OSError) as error:
                    self.say(model.line, f"{label}: {in_keys(one_line(error))}")
        return sound

    def cells(self, entry: MethodEntry, sound: set[str]) -> Iterator[Cell]:
        judged = entry.method == GUIDE or (entry.method != PLAIN and METHODS[entry.method].judged)
        policies = self._labelled(entry, "policies")
        scorers: list[str | None] = [None]
        if judged:
            scorers = list(self._labelled(entry, "scorers"))
            if not self.ablation.scorers:
                self.say(entry.line, f"{entry.name} asks a scorer: expected scorers in the file")
        elif entry.scorers is not None:
            self.say(entry.line, f"{entry.name} asks no scorer: drop scorers")
        for policy in policies:
            for scorer in scorers:
                names = {f"policies {policy}", *([] if scorer is None else [f"scorers {scorer}"])}
                if names <= sound:
                    yield from self._paired(entry, policy, scorer)

    def _labelled(self, entry: MethodEntry, kind: str) -> list[str]:
        known = getattr(self.ablation, kind)
        asked = getattr(entry, kind)
        for label in asked or ():
            if label not in known:
                self.say(entry.line, f"{kind}: {label}: expected one of the file's, "
                         f"{', '.join(known)}")  # fmt: skip
        return [label for label in (known if asked is None else asked) if label in known]

    def _paired(self, entry: MethodEntry, policy: str, scorer: str | None) -> Iterator[Cell]:
        if "reference" in entry.values and "kl_coef" not in entry.values:
            self.say(entry.values["reference"].line, f"{entry.name}: reference is of a KL term: "
                     "give kl_coef, or drop it")  # fmt: skip
            return
        who = self.ablation.policies[policy]
        by = None if scorer is None else self.ablation.scorers[scorer]
        values = {name: setting.value for name, setting in entry.values.items()}
        swept = tuple(name for name, tried in values.items() if len(tried) > 1)
        for given in products(values):
            given = {name: value for name, value in given.items() if value is not None}
            try:
                yield self._cell(entry, who, by, given, swept)
            except (Refusal, ValueError, OSError) as error:
                said = in_keys(one_line(error))
                self.say(_line_of(entry, said), f"{entry.name}: {said}")

    def _cell(
        self, entry: MethodEntry, policy: Model, scorer: Model | None, given: dict[str, Any],
        swept: tuple[str, ...],
    ) -> Cell:  # fmt: skip
        text_format = format_of(policy.get("prompt_format"), find(policy.model))
        reading = ScorerOptions() if scorer is None else scorer.group(ScorerOptions)
        trusted = reading.trust_remote_code or policy.get("trust_remote_code", False)
        reading = replace(reading, trust_remote_code=trusted)
        plan: Plan | TokenPlan
        reference = None
        if entry.method in (PLAIN, GUIDE):
            plan, reading = self._tokens(entry, policy, scorer, reading, given)
        else:
            if given.get("kl_coef"):
                reference = given.get("reference") or reading.reference
            plan = self._search(entry, policy, scorer, reading, reference, given)
        setting = Setting(
            policy.label, None if scorer is None else scorer.label, entry.method, entry.name,
            given, swept, _draws(plan), plan.max_tokens != self.ablation.max_new_tokens,
        )  # fmt: skip
        return Cell(setting, plan, policy, scorer, reading, text_format, reference)

    def _tokens(
        self, entry: MethodEntry, policy: Model, scorer: Model | None, reading: ScorerOptions,
        given: Mapping[str, Any],
    ) -> tuple[Plan | TokenPlan, ScorerOptions]:  # fmt: skip
        longest = given.get("max_new_tokens", self.ablation.max_new_tokens)
        temperature = given.get("temperature", 1.0)
        Sampling(temperature, 1, longest)
        engine = policy.group(EngineOptions)
        if entry.method == PLAIN:
            record = find(policy.model)
            at_strings = record is not None and bool(record.stop)
            if engine.on_servers or engine.on_vllm or at_strings:
                return self._one_draw(temperature, longest).ending(record), reading
            return TokenPlan(None, temperature, longest), reading
        options = _guidance(given)
        reading = options.reading(reading)
        config = options.over(_DEFAULT)
        assert scorer is not None
        if config.kl_coef and (reference := given.get("reference")) is not None:
            pairs.check_one_reference(scorer, reading, reference)
            reading = replace(reading, reference=reference)
        pairs.check_guided(policy, scorer, reading, config)
        return TokenPlan(config, temperature, longest), reading

    def _one_draw(self, temperature: float, longest: int) -> Plan:
        """Plain decoding as a search, which every engine has, and which sees strings."""
        one = MethodOptions(n=1, temperature=temperature)
        return read_plan("vote", one, None, longest, BudgetOptions(), 0)

    def _search(
        self, entry: MethodEntry, policy: Model, scorer: Model | None, reading: ScorerOptions,
        reference: str | None, given: Mapping[str, Any],
    ) -> Plan:  # fmt: skip
        own, limits = ({f.name for f in fields(kind)} for kind in (MethodOptions, BudgetOptions))
        settings = {name: value for name, value in given.items() if name in own}
        if isinstance(stop := settings.get("stop"), tuple):
            settings["stop"] = list(stop)
        plan = read_plan(
            entry.method, MethodOptions(**settings), given.get("answer"),
            given.get("max_new_tokens", self.ablation.max_new_tokens),
            BudgetOptions(**{n: v for n, v in given.items() if n in limits}), 0,
        )  # fmt: skip
        name = None if scorer is None else scorer.model
        asked = replace(reading, reference=reference or reading.reference)
        policy.group(EngineOptions).check(policy.model, plan.settings.get("kl_coef"))
        named(plan, policy.model, name, asked)
        if scorer is not None:
            pairs.check_searched(policy, scorer, plan)
        return plan.ending(find(policy.model))


def _guidance(given: Mapping[str, Any]) -> GuidanceOptions:
    """The options of guidance, those of a file of `calibrate` where nothing else is said.

    Raises Refusal: there is no such file, or it has no guidance.
    """
    names = [f.name for f in fields(GuidanceOptions)]
    own = {name: value for name, value in given.items() if name in names}
    if (file := given.get("config")) is not None:
        sections, problems = read_config(Path(file))
        if problems or not sections.get(GUIDANCE):
            raise Refusal(f"config: {file}: expected a file with guidance, as guided-decode "
                          "calibrate --output writes")  # fmt: skip
        odd = next((name for name in sections[GUIDANCE] if name not in names), None)
        if odd is not None:
            raise Refusal(f"config: {file}: " + unknown(odd, names, "setting of guidance"))
        for name, setting in sections[GUIDANCE].items():
            if setting.value is not None:
                own.setdefault(name, setting.value)
    return GuidanceOptions(**own)


def _draws(plan: Plan | TokenPlan) -> bool:
    """Whether a seed changes anything."""
    if isinstance(plan, TokenPlan):
        return plan.temperature != 0.0
    settings = plan.method.checked(plan.settings)
    if plan.method.function is METHODS["ppo-mcts"].function:
        return bool(settings["sample"])
    return bool(settings.get("temperature", 1.0) != 0.0)


def _line_of(entry: MethodEntry, said: str) -> int:
    """The line of the setting that an error speaks of, else the entry's."""
    found = {name: re.search(rf"(?<![\w-]){name}(?![\w-])", said) for name in entry.values}
    spoken = [(match.start(), name) for name, match in found.items() if match is not None]
    return entry.values[min(spoken)[1]].line if spoken else entry.line
