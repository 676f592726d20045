"""A guided token's cost on a CPU in this checkout and in another, in turn.

    python -m benchmarks.lookahead_against ../before
    python -m benchmarks.lookahead_against ../before --out benchmarks/results

The cases of `lookahead`, over the same random policy and critic in float32. Each checkout is a
process of its own; within a round one takes its turn after the other, the first by turns, and
ratios are taken within a round.
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
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import lookahead_step
from benchmarks.baselines import Shape
from benchmarks.pairs import Case
from benchmarks.report import WIDTH, environment

_ROOT = Path(__file__).resolve().parent.parent
_FILES = ("lookahead_against.json", "lookahead_against.txt")
_STEPS = 4
Turn = dict[str, float]


@dataclass(frozen=True)
class Compared:
    """A case's turns, seconds a token by way, here and there, in the order of the rounds."""

    case: Case
    here: list[Turn]
    there: list[Turn]

    def ratios(self, way: str) -> list[float]:
        """Our time over the other's, round by round."""
        return [a[way] / b[way] for a, b in zip(self.here, self.there, strict=True)]

    @property
    def is_slower(self) -> bool:
        """Whether guided decoding is, by more than its median and plain decoding's tell apart."""
        return statistics.median(self.ratios("ours")) > max(
            1.02, statistics.median(self.ratios("plain"))
        )


@contextmanager
def process_of(checkout: Path, threads: int, slots: int) -> Iterator["subprocess.Popen[str]"]:
    """The turns over the package in `checkout`."""
    process = subprocess.Popen(
        [sys.executable, "-P", lookahead_step.__file__, str(threads), str(slots)],
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def ask(process: "subprocess.Popen[str]", order: dict[str, Any]) -> Turn:
    """Its answer to one order. Raises RuntimeError: it ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("a checkout's process ended: its message is above")
    turn: Turn = json.loads(answer)
    return turn


def compare(
    here: "subprocess.Popen[str]", there: "subprocess.Popen[str]", case: Case, rounds: int
) -> Compared:
    """Both checkouts' turns of a case."""
    sides = (here, there)
    for side in sides:
        ask(side, asdict(case))
    found: tuple[list[Turn], list[Turn]] = ([], [])
    for turn in range(rounds):
        for which in ((0, 1), (1, 0))[turn % 2]:
            found[which].append(ask(sides[which], {"steps": _STEPS}))
    return Compared(case, *found)


def table(results: Sequence[Compared]) -> Table:
    """Milliseconds a token here and there, and the ratios."""
    made = Table(
        title="Milliseconds a token, policy and critic steps added",
        caption="Ratios: this checkout over the other, median of the rounds (least–most).",
    )
    for name in ("batch", "prefix", "k", "there", "here", "here / there", "plain: here / there"):
        made.add_column(name, justify="right", no_wrap=True)
    for each in results:
        case = each.case
        times = (
            f"{1e3 * statistics.median(turn['ours'] for turn in turns):.1f}"
            for turns in (each.there, each.here)
        )
        made.add_row(
            str(case.batch), str(case.prefix), str(case.k), *times,
            _spread(each.ratios("ours")), _spread(each.ratios("plain")),
            style="red" if each.is_slower else None,
        )  # fmt: skip
    return made


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def verdict(results: Sequence[Compared]) -> str:
    """In a line, whether any case is slower here."""
    slower = [str(each.case) for each in results if each.is_slower]
    return f"slower here: {'; '.join(slower)}" if slower else "no case is slower here"


def write(results: Sequence[Compared], about: dict[str, Any], folder: Path) -> None:
    """lookahead_against.json and .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [asdict(each.case) | {"here": each.here, "there": each.there} for each in results]
    numbers, text = (folder / name for name in _FILES)
    numbers.write_text(json.dumps(about | {"cases": cases, "verdict": verdict(results)}, indent=1))
    with text.open("w") as file:
        console = Console(file=file, width=WIDTH, color_system=None)
        console.print(about["date"], about["command"], sep=" · ")
        console.print(table(results), verdict(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that were asked for."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    cases = [Case(*size) for size in itertools.product(options.batch, options.prefix, options.k)]
    slots = max(
        case.batch * (case.prefix + (_STEPS * options.rounds + 4) * (case.k + 1)) for case in cases
    )
    # The other checkout by its name: where it lay is nobody's business.
    shown = [options.other.name if each == str(options.other) else each for each in given]
    about = environment(
        " ".join(["python -m benchmarks.lookahead_against", *shown]), asdict(Shape())
    )
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(process_of(root, options.threads, slots))
            for root in (_ROOT, options.other)
        )
        results = [compare(here, there, case, options.rounds) for case in cases]
    Console().print(table(results), verdict(results))
    if options.out:
        write(results, about, options.out)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lookahead_against", description=__doc__.splitlines()[0]
    )
    parser.add_argument("other", type=Path, help="the root of another checkout of this project")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 512, 1024], help="tokens")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16], help="candidates a row")
    parser.add_argument("--rounds", type=int, default=9, help="of each case")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch's")
    parser.add_argument("--out", type=Path, help="folder for lookahead_against.json and .txt")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
