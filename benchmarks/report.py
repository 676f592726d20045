"""What was measured, against what was asked for: a table, and JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pairs import Case, Result

WIDTH = 140


@dataclass(frozen=True)
class Target:
    """A bound on a ratio's median: `most` for ours over plain, `least` for ours against a way."""

    case: Case
    against: str
    bound: float

    def __str__(self) -> str:
        sign = "≤" if self.against == "plain" else "≥"
        asked = "of plain" if self.against == "plain" else f"faster than {self.against}"
        return f"{self.case}: {sign} {self.bound:g}× {asked}"

    def measured(self, result: Result) -> float:
        ratio = result.over_plain if self.against == "plain" else result.faster_than(self.against)
        return ratio.median

    def met(self, result: Result) -> bool:
        value = self.measured(result)
        return value <= self.bound if self.against == "plain" else value >= self.bound


TARGETS = (
    Target(Case(1, 512, 8), "plain", 2.2),
    Target(Case(1, 512, 8), "recomputed", 50),
    Target(Case(1, 512, 8), "copied", 2.5),
    Target(Case(1, 1024, 16), "plain", 2.8),
    Target(Case(1, 1024, 16), "copied", 8),
)


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and whether that meets it."""

    target: str
    measured: float
    met: bool


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Every target whose case was run, and the one that holds for all cases."""
    by_case = {result.case: result for result in results}
    found = [
        Verdict(str(t), t.measured(by_case[t.case]), t.met(by_case[t.case]))
        for t in TARGETS
        if t.case in by_case
    ]
    slowest = min(r.faster_than(way).median for r in results for way in ("copied", "recomputed"))
    return [*found, Verdict("every case: faster than copied and recomputed", slowest, slowest > 1)]


def table(results: Sequence[Result]) -> Table:
    """Milliseconds a token, medians over the rounds, and ratios as median (least–most)."""
    made = Table(
        title="Milliseconds a token, policy and critic steps added",
        caption="Ratios: median of the rounds' ratios (least–most). Rounds: of all ways; of "
        "recomputation, where one row of a batch is timed and scaled.",
    )
    for name in ("batch", "prefix", "k", "plain", "ours", "copied", "recomputed"):
        made.add_column(name, justify="right")
    for name in ("ours / plain", "copied / ours", "recomputed / ours", "rounds"):
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        case, ways = result.case, ("plain", "ours", "copied", "recomputed")
        ratios = [result.over_plain, *(result.faster_than(way) for way in ways[2:])]
        made.add_row(
            *(str(size) for size in (case.batch, case.prefix, case.k)),
            *(f"{result.milliseconds(way):,.1f}" for way in ways),
            *(f"{r.median:.2f} ({r.least:.2f}–{r.most:.2f})" for r in ratios),
            f"{len(result.seconds['ours'])}; {len(result.seconds['recomputed'])}",
        )
    return made


def environment(
    command: str, models: dict[str, Any], packages: Sequence[str] = ()
) -> dict[str, Any]:
    """What a reader needs to judge the figures; packages: more whose versions matter."""
    names = ("guided-decode", "torch", "transformers", *packages)
    return {
        "date": date.today().isoformat(),
        "command": command,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
        },
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "models": models,
    }


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def show(results: Sequence[Result], console: Console) -> None:
    """The table, and a line for each target."""
    console.print(table(results))
    for verdict in verdicts(results):
        colour = "green" if verdict.met else "red"
        word = "met" if verdict.met else "not met"
        console.print(f"[{colour}]{word:>7}[/]  {verdict.target}: {verdict.measured:.2f}")


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """lookahead.json and lookahead.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        asdict(r.case)
        | {
            "largest_difference": r.difference,
            "steps_in_a_turn": r.steps,
            "milliseconds": {way: round(r.milliseconds(way), 3) for way in r.seconds},
            "ours_over_plain": asdict(r.over_plain),
            "copied_over_ours": asdict(r.faster_than("copied")),
            "recomputed_over_ours": asdict(r.faster_than("recomputed")),
            "seconds": {way: [round(s, 6) for s in turns] for way, turns in r.seconds.items()},
        }
        for r in results
    ]
    written = about | {"cases": cases, "targets": [asdict(v) for v in verdicts(results)]}
    (folder / "lookahead.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    with (folder / "lookahead.txt").open("w") as file:
        console = Console(file=file, width=WIDTH, color_system=None)
        console.print(about["date"], about["command"], f"{about['threads']} threads", sep=" · ")
        show(results, console)
