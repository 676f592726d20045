"""What a guided token costs on a CPU, against plain decoding and against what others do.

    python -m benchmarks.lookahead                          # everything, under 15 minutes
    python -m benchmarks.lookahead --batch 1 --prefix 512 --k 8
    python -m benchmarks.lookahead --out benchmarks/results # writes lookahead.json and .txt

A random policy and critic in float32. The ways are checked against each other before anything is
timed, then take turns within each round; nothing is reported where they differ. The policy, and
the critic of the other ways, run as transformers runs them; ours has what the package gives every
critic on a CPU, its linear layers through oneDNN (guided_decode/forward/cpu_linear.py) among it.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.baselines import Models, Shape
from benchmarks.pairs import TURN_STEPS, Case, DisagreementError, Result, run_case
from benchmarks.report import WIDTH, environment, show, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that were asked for; exit code 1 where the ways do not agree."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape()
    about = environment(
        " ".join(["python -m benchmarks.lookahead", *given]), asdict(shape) | {"dtype": "float32"}
    )
    sizes = itertools.product(options.batch, options.prefix, options.k)
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    try:
        results = run([Case(*size) for size in sizes], shape, options, console)
    except DisagreementError as error:
        console.print(f"[red]nothing is reported:[/] {error}")
        return 1
    show(results, console)
    if options.out:
        write(results, about, options.out)
    return 0


@torch.no_grad()
def run(
    cases: list[Case], shape: Shape, options: argparse.Namespace, console: Console
) -> list[Result]:
    models = Models.random(shape, cache_tokens=pool_size(cases, options.pairs))
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            results.append(run_case(models, case, options.pairs, options.recompute_seconds))
            progress.advance(task)
    return results


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lookahead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument(
        "--prefix", type=int, nargs="+", default=[128, 512, 1024], help="tokens of each prompt"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16], help="candidates a row")
    parser.add_argument("--pairs", type=int, default=10, help="rounds of each case")
    parser.add_argument(
        "--recompute-seconds",
        type=float,
        default=30.0,
        help="full recomputation joins as many rounds of a case as this buys, at least three",
    )
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="folder for lookahead.json and lookahead.txt")
    return parser.parse_args(arguments)


def pool_size(cases: list[Case], pairs: int) -> int:
    """Slots for the largest case without evictions."""
    steps = TURN_STEPS * pairs + 8
    return max(case.batch * (case.prefix + steps * (case.k + 1)) for case in cases)


if __name__ == "__main__":
    sys.exit(main())
