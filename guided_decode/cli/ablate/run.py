"""Works off the units of an ablation: what is kept already stays, and the rest is computed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guided_decode.cli.ablate.answers import empty
from guided_decode.cli.ablate.cell import Cell
from guided_decode.cli.ablate.models import Group
from guided_decode.cli.ablate.rewards import open_reward, reward_identity, rollout_row
from guided_decode.cli.ablate.schema import Ablation
from guided_decode.cli.ablate.words import in_keys
from guided_decode.cli.errors import Refusal
from guided_decode.cli.run_identity import digest
from guided_decode.cli.search_rows import SearchRow
from guided_decode.cli.token_values import rounded
from guided_decode.lab.ablate.estimate import most_tokens
from guided_decode.lab.ablate.grid import Unit, blocks
from guided_decode.lab.ablate.outcomes import Outcome, answer_of
from guided_decode.lab.ablate.runner import work_off
from guided_decode.lab.ablate.store import Store

UNITS, REWARDS = "units", "rewards"
# Seconds over which the bar's speed is taken: units differ.
_WINDOW = 900.0


@dataclass(slots=True)
class Task:
    """A unit with its cell."""

    cell: Cell
    unit: Unit


@dataclass(slots=True)
class Run:
    """An ablation under way.

    ablation: what its file says. rows: the prompts. cells: in the file's order. groups: the cells
    by the models that they share, with the tasks of each, and those of them that are not done.
    prompt_tokens: of a prompt, on average. limit: of the prompts, as the command had it.
    """

    ablation: Ablation
    rows: list[SearchRow]
    cells: list[Cell]
    groups: list[Group]
    store: Store
    prompt_tokens: float
    limit: int | None = None
    tasks: list[list[Task]] = field(default_factory=list)
    missing: list[list[Task]] = field(default_factory=list)
    _identities: dict[str, str] = field(default_factory=dict)

    def find(self) -> None:
        """Says what is to be done, and what is done. Raises Refusal: a model is not there."""
        for group in self.groups:
            wanted = units_of(self.ablation, group.cells, len(self.rows))
            units = group.keys(self.rows, wanted)
            own = [Task(cell, unit) for (cell, *_), unit in zip(wanted, units, strict=True)]
            self.tasks.append(own)
            self.missing.append([t for t in own if self.store.get(UNITS, t.unit.key) is None])

    @property
    def raw(self) -> bool:
        """Whether prompts are text as it is."""
        assert self.ablation.prompts is not None
        return bool(self.ablation.prompts.given.get("raw"))

    @property
    def every(self) -> list[Task]:
        """All tasks."""
        return [task for own in self.tasks for task in own]

    def decode(self, done: Callable[[Task], None]) -> None:
        """Computes what is missing, group by group. Raises Refusal, ValueError or ConnectionError:
        names the unit that failed; what was finished is kept."""
        for group, missing in zip(self.groups, self.missing, strict=True):
            if missing:
                self._decode_group(group, missing, done)

    def _decode_group(
        self, group: Group, missing: Sequence[Task], done: Callable[[Task], None]
    ) -> None:
        with group.loaded() as answers:

            def work(task: Task) -> dict[str, Any]:
                rows = [self.rows[i] for i in task.unit.rows]
                try:
                    return answers.answer(task.cell, task.unit, rows)
                except (Refusal, ValueError) as error:
                    raise Refusal(f"{task.cell.setting.label} on {task.cell.policy.label}: "
                                  f"{in_keys(str(error))}") from error  # fmt: skip

            def finished(task: Task, found: dict[str, Any]) -> None:
                self.store.put(UNITS, task.unit.key, found)
                done(task)

            at_once = self.ablation.parallel if group.engine.on_servers else 1
            work_off(missing, work, finished, at_once=at_once, waiting_for=_say_waiting)

    def judge(self, done: Callable[[Task], None]) -> None:
        """Gives rewards to what has none yet. Raises Refusal or ValueError: one cannot be had."""
        reward = self.ablation.reward
        assert reward is not None
        judges: dict[str, Any] = {}
        for task in self.every:
            key = self._reward_key(task)
            if self.store.get(REWARDS, key) is None:
                label = task.cell.policy.label
                if label not in judges:
                    # One at a time in memory.
                    judges.clear()
                    judges[label] = open_reward(
                        reward, task.cell.policy, task.cell.text_format, self.raw
                    )
                self.store.put(REWARDS, key, {"rewards": self._rewards(task, judges[label])})
            done(task)

    def _rewards(self, task: Task, judge: Any) -> list[float]:
        found = self._found(task)
        assert self.ablation.reward is not None
        rows = [
            rollout_row(self.rows[i], self.ablation.reward, answer)
            for i, answer in zip(task.unit.rows, found["answers"], strict=True)
        ]
        try:
            # What it remembers of other units changes a score's last digits.
            empty(getattr(getattr(judge, "judge", None), "scorer", None))
            return [rounded(float(each)) or 0.0 for each in judge.rewards(rows)]
        except (Refusal, ValueError) as error:
            said = str(error).replace("--judge", "function")
            raise Refusal(f"the reward of {task.cell.setting.label} on {task.cell.policy.label}: "
                          f"{said}") from error  # fmt: skip

    def _found(self, task: Task) -> dict[str, Any]:
        found = self.store.get(UNITS, task.unit.key)
        if found is None:
            raise Refusal(f"{self.store.folder}: a unit that was finished is damaged or gone: run "
                          "the same command again")  # fmt: skip
        return found

    def _reward_key(self, task: Task) -> str:
        label = task.cell.policy.label
        if label not in self._identities:
            assert self.ablation.reward is not None
            self._identities[label] = reward_identity(
                self.ablation.reward, task.cell.policy, task.cell.text_format, self.raw
            )
        compared = self.ablation.reward.given.get("field") if self.ablation.reward else None
        return digest([task.unit.key, self._identities[label], compared])

    def check_reward(self) -> None:
        """Finds the reward model of each policy. Raises Refusal, ValueError or ConnectionError: it
        is not there."""
        for own in self.tasks:
            self._reward_key(own[0])

    def outcomes(self) -> list[Outcome]:
        """Everything that was decoded and judged, a setting's together, in the cells' order."""
        made = {id(cell): Outcome(cell.setting) for cell in self.cells}
        for task in self.every:
            outcome, found = made[id(task.cell)], self._found(task)
            kept = self.store.get(REWARDS, self._reward_key(task))
            assert kept is not None
            outcome.seconds += found["seconds"]
            outcome.by_seed.setdefault(task.unit.seed, []).extend(
                answer_of(answer, reward)
                for answer, reward in zip(found["answers"], kept["rewards"], strict=True)
            )
        return list(made.values())

    def cost(self, task: Task) -> float:
        """Tokens that a unit takes at most, of policy and scorer."""
        return sum(cell_cost(task.cell, self.prompt_tokens)) * task.unit.count


def _say_waiting(count: int) -> None:
    print(f"interrupted: {count} units under way are finished first; Ctrl-C again leaves them",
          file=sys.stderr)  # fmt: skip


def units_of(
    ablation: Ablation, cells: Sequence[Cell], prompts: int
) -> list[tuple[Cell, int, int, int]]:
    """Cell, seed, first prompt and count of each unit of a group: all settings on the first block
    of prompts, then on the next, so that whenever it is looked at, they have had the same."""
    return [
        (cell, seed, first, count)
        for first, count in blocks(prompts, ablation.block)
        for cell in cells
        for seed in (ablation.seeds if cell.setting.draws else ablation.seeds[:1])
    ]


def cell_cost(cell: Cell, prompt_tokens: float) -> tuple[float, float]:
    """The most tokens of policy and scorer that a response takes."""
    return most_tokens(
        cell.setting.method, cell.shown, prompt_tokens, cell.plan.max_tokens,
        scored=cell.scorer is not None,
    )  # fmt: skip


def progress(run: Run) -> tuple[Progress, Callable[[Task], None], Callable[[Task], None]]:
    """A bar on stderr with the time that is left, and what tells it of a unit that was decoded, and
    of one that was judged."""
    console = Console(stderr=True)
    columns = (TextColumn("ablating"), BarColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    bar = Progress(*columns, console=console, disable=not console.is_terminal,
                   speed_estimate_period=_WINDOW)  # fmt: skip
    every, missing = run.every, [task for own in run.missing for task in own]
    done = [len(every) - len(missing)]

    def said() -> str:
        return f"{done[0]} of {len(every)} units"

    # What was done before is no part of the speed.
    line = bar.add_task(said(), total=sum(map(run.cost, missing)))

    def finished(task: Task) -> None:
        done[0] += 1
        bar.update(
            line, advance=run.cost(task), description=f"{said()} · {task.cell.setting.label}"
        )

    judged = [0]

    def rewarded(task: Task) -> None:
        judged[0] += 1
        bar.update(line, description=f"{judged[0]} of {len(every)} units judged")

    return bar, finished, rewarded
