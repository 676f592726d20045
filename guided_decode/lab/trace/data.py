"""A trace as JSON: what the page reads. Tokens and steps that occur often are written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.trace.branches import branches
from guided_decode.lab.trace.record import Run, Trace, TracedPrompt
from guided_decode.lab.trace.steps import Step

VERSION = 1
# The share of tokens whose advantage the colours tell apart: one that stands out pales no others.
_COLOURED = 0.95


def as_data(trace: Trace) -> dict[str, Any]:
    """The trace as JSON has it.

    tokens: [id, text] of every token that is spoken of, elsewhere by its place here. scale: the
    advantage of the deepest colour. Of each prompt:

    steps: [V(s) or null, candidates that there were, their rows]; a row is [token, probability,
        guided probability, Q or null, A or null].
    runs: path has, for each token, [step, its row, 1 where it was no candidate, value after it or
        null]; visits has, for each token, pairs [row, visits].
    branches: of a search's responses, [parent or null, run, begin, end, runs that end here].
    """
    tokens = _Tokens()
    prompts = [_prompt(each, tokens) for each in trace.prompts]
    return {
        "version": VERSION,
        "policy": trace.policy,
        "scorer": trace.scorer,
        "guidance": _guidance(trace.config),
        "decoding": dict(trace.decoding),
        "summed": trace.summed,
        "scale": _scale(trace),
        "tokens": tokens.listed,
        "prompts": prompts,
    }


def _guidance(config: GuidanceConfig) -> dict[str, Any]:
    """The settings that say what guidance does here, and those that are no defaults."""
    weight = "beta" if config.rule == "reweight" else "margin"
    usual = asdict(GuidanceConfig())
    given = asdict(config)
    named = {"rule": config.rule, weight: given[weight], "top_k": given["top_k"] or "all",
             "tail": config.tail}  # fmt: skip
    others = {name: value for name, value in given.items() if value != usual[name]}
    return named | {name: value for name, value in others.items()
                    if name not in ("rule", "beta", "margin", "top_k", "tail")}  # fmt: skip


@dataclass(slots=True)
class _Tokens:
    """Every token with the text that it has where it stands."""

    listed: list[list[Any]] = field(default_factory=list)
    places: dict[tuple[int, str], int] = field(default_factory=dict)

    def place(self, token: int, text: str) -> int:
        place = self.places.setdefault((token, text), len(self.listed))
        if place == len(self.listed):
            self.listed.append([token, text])
        return place


@dataclass(slots=True)
class _Steps:
    """Steps by their prefix: responses that begin alike have these in common."""

    tokens: _Tokens
    listed: list[list[Any]] = field(default_factory=list)
    # Of (the step before, its token) and of a step's tokens.
    after: dict[tuple[int, int], int] = field(default_factory=dict)
    rows: list[dict[int, int]] = field(default_factory=list)

    def place(self, before: tuple[int, int], step: Step, texts: Sequence[str]) -> int:
        """Where a step is listed; a token of it that an equal prefix had not is added there."""
        place = self.after.setdefault(before, len(self.listed))
        if place == len(self.listed):
            self.listed.append([_number(step.baseline), step.considered, []])
            self.rows.append({})
        rows = self.rows[place]
        for i, token in enumerate(step.tokens):
            if token not in rows:
                rows[token] = len(rows)
                self.listed[place][2].append([
                    self.tokens.place(token, texts[i]),
                    _number(step.probabilities[i], 4),
                    _number(step.guided[i], 4),
                    _number(step.values[i]),
                    _number(step.advantages[i]),
                ])  # fmt: skip
        return place


def _prompt(prompt: TracedPrompt, tokens: _Tokens) -> dict[str, Any]:
    steps = _Steps(tokens)
    is_search = prompt.method is not None
    tree = branches([run.ids for run in prompt.runs]) if is_search else []
    runs = [_run(run, steps) for run in prompt.runs]
    return {
        "name": prompt.name,
        "messages": [list(each) for each in prompt.messages],
        "method": prompt.method,
        "chosen": prompt.chosen,
        "runs": runs,
        "steps": steps.listed,
        "branches": [[b.parent, b.of, b.begin, b.end, list(b.ending)] for b in tree],
    }


def _run(run: Run, steps: _Steps) -> dict[str, Any]:
    path: list[list[Any]] = []
    before = (-1, -1)
    for token, step, texts, after in zip(run.ids, run.steps, run.texts, run.after, strict=True):
        place = steps.place(before, step, texts)
        path.append([place, steps.rows[place][token], int(step.outside), _number(after)])
        before = (place, token)
    visits = [
        [[steps.rows[own[0]][token], count] for token, count in each.items()
         if token in steps.rows[own[0]]]
        for own, each in zip(path, run.visits, strict=bool(run.visits))
    ]  # fmt: skip
    return {
        "name": run.name,
        "guided": run.guided,
        "facts": dict(run.facts),
        "pieces": list(run.pieces),
        "path": path,
        "visits": visits,
    }


def _scale(trace: Trace) -> float:
    """The absolute advantage that most tokens of the responses do not exceed; 1 for none."""
    runs = [run for prompt in trace.prompts for run in prompt.runs]
    own = [step.advantages[step.chosen] for run in runs for step in run.steps]
    sizes = sorted(abs(each) for each in own if each)
    if not sizes:
        return 1.0
    found = _number(sizes[min(int(_COLOURED * len(sizes)), len(sizes) - 1)], 3)
    assert found is not None
    return found


def _number(value: float | None, digits: int = 6) -> float | None:
    """So many digits: what lies beyond varies with the batch it was computed in."""
    # Adding zero turns −0.0 into 0.0.
    return None if value is None else float(f"{value:.{digits}g}") + 0.0
