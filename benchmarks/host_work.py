"""The host's work in a guided step, whatever the critic: microseconds a row, by part.

    python -m benchmarks.host_work                            # everything
    python -m benchmarks.host_work --rows 32 --k 16 --full    # and with a pool that is full
    python -m benchmarks.host_work --against ../before        # and over another checkout, in turn
    python -m benchmarks.host_work --out benchmarks/results   # writes host_work.json and .txt

The engine's step, from vLLM's lists of tokens to guided logits, without vLLM, over a critic whose
forward is next to nothing and counted apart (`host_step`); its logits are held to the rule at each
turn's first step. Times are of the thread, so that a busy machine adds little. The checkouts, each
in a process of its own, take turns within each round, and ratios are taken within a round.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import host_step
from benchmarks.host_step import Case, DisagreementError, Timed, Turn
from benchmarks.report import WIDTH, environment

_ROOT = Path(__file__).resolve().parent.parent
_PARTS = ("before", "look_up", "after")
# Microseconds: of a step at one row; of a row at more.
_TARGETS = {1: 250.0, 32: 15.0, 128: 10.0}


class Worker(Protocol):
    """Times turns of one checkout."""

    def begin(self, case: Case, most_steps: int) -> None: ...
    def turn(self, steps: int) -> Turn: ...


@dataclass(frozen=True)
class Result:
    """A case's turns in this checkout, and in the other, in the order of the rounds."""

    case: Case
    turns: list[Turn]
    others: list[Turn]

    @property
    def ratios(self) -> list[float]:
        """The other's time over ours, round by round."""
        pairs = zip(self.others, self.turns, strict=False)
        return [other.total / own.total for other, own in pairs]

    @property
    def target(self) -> float | None:
        """Microseconds a row."""
        return _TARGETS.get(self.case.rows)


class Process:
    """A worker over the package of another checkout."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def begin(self, case: Case, most_steps: int) -> None:
        self._ask({"case": asdict(case), "most_steps": most_steps})

    def turn(self, steps: int) -> Turn:
        return Turn(**self._ask({"steps": steps}))

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the other checkout's process ended: its message is above")
        return json.loads(answer)


@contextmanager
def process_of(checkout: Path) -> Iterator[Process]:
    """A process of this benchmark's steps over the package in `checkout`."""
    process = subprocess.Popen(
        [sys.executable, "-P", host_step.__file__],
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Process(process)
    finally:
        process.terminate()
        process.wait(30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that were asked for; exit code 1 where guided logits are not the rule's."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    torch.set_num_threads(1)
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    # The other checkout by its name: where it lay is nobody's business.
    against = None if options.against is None else options.against.name
    shown = [options.against.name if each == str(options.against) else each for each in given]
    about = environment(
        " ".join(["python -m benchmarks.host_work", *shown]), {"vocab": host_step.VOCAB}
    )
    pools = (False, True) if options.full else (False,)
    sizes = itertools.product(options.rows, options.prefix, options.k, pools)
    cases = sorted((Case(*size) for size in sizes), key=lambda case: case.full)
    with ExitStack() as stack:
        own: Worker = Timed()
        other: Worker | None = None
        if options.against is not None:
            own = stack.enter_context(process_of(_ROOT))
            other = stack.enter_context(process_of(options.against))
        try:
            results = [run_case(own, other, case, options) for case in cases]
        except DisagreementError as error:
            console.print(f"[red]nothing is reported:[/] {error}")
            return 1
    console.print(table(results))
    if options.out:
        write(results, about | {"against": against}, options.out)
    return 0


def run_case(own: Worker, other: Worker | None, case: Case, options: argparse.Namespace) -> Result:
    """Sets a case up everywhere, warms up, then times a turn of each in every round."""
    workers = [own] if other is None else [own, other]
    for worker in workers:
        worker.begin(case, options.steps * (options.rounds + 1))
        worker.turn(options.steps)
    turns: dict[int, list[Turn]] = {id(worker): [] for worker in workers}
    for number in range(options.rounds):
        for worker in workers if number % 2 else workers[::-1]:
            turns[id(worker)].append(worker.turn(options.steps))
    return Result(case, turns[id(own)], [] if other is None else turns[id(other)])


def table(results: Sequence[Result]) -> Table:
    """Microseconds a row."""
    made = Table(
        title="Microseconds of the host a row and step, without the critic's forward",
        caption="Medians of the rounds; ratios: the other checkout over this one, within a round "
        "(least–most). before: histories, candidates; look-up: the scorer; after: the rule.",
    )
    with_other = any(result.others for result in results)
    names = ["rows", "prefix", "k", "pool", "before", "look-up", "after", "all", "a step", "target"]
    for name in names + (["other", "other / this"] if with_other else []):
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        case = result.case
        whole = median(result.turns, "total")
        row = [str(case.rows), str(case.prefix), str(case.k), "full" if case.full else "room"]
        row += [f"{median(result.turns, part) / case.rows:.1f}" for part in _PARTS]
        row += [f"{whole / case.rows:.1f}", f"{whole:,.0f}"]
        row.append("" if result.target is None else f"{result.target:g}")
        if result.others:
            ratios = result.ratios
            row.append(f"{median(result.others, 'total') / case.rows:.1f}")
            row.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        made.add_row(*row)
    return made


def median(turns: Sequence[Turn], part: str) -> float:
    """Microseconds a step of a part, or of all."""
    return statistics.median(getattr(turn, part) for turn in turns)


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """host_work.json and host_work.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        asdict(r.case)
        | {"microseconds_a_step": _parts(r.turns), "other": _parts(r.others) if r.others else None}
        | {"ratios": [round(ratio, 3) for ratio in r.ratios]}
        for r in results
    ]
    text = json.dumps(about | {"cases": cases}, indent=1, ensure_ascii=False)
    (folder / "host_work.json").write_text(text + "\n")
    with (folder / "host_work.txt").open("w") as file:
        console = Console(file=file, width=WIDTH, color_system=None)
        load = f"load average {about['load_average']} on {about['cores']} cores"
        console.print(about["date"], about["command"], load, sep=" · ")
        console.print(table(results))


def _parts(turns: Sequence[Turn]) -> dict[str, float]:
    return {part: round(median(turns, part), 1) for part in (*_PARTS, "forward", "total")}


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_work", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prefix", type=int, nargs="+", default=[64, 4096], help="tokens of each")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16], help="candidates a row")
    parser.add_argument("--rounds", type=int, default=9, help="of each case")
    parser.add_argument("--steps", type=int, default=40, help="of a turn")
    parser.add_argument("--full", action="store_true", help="each case with a full pool as well")
    parser.add_argument("--against", type=Path, help="the root of another checkout of this project")
    parser.add_argument("--out", type=Path, help="folder for host_work.json and host_work.txt")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
