"""What a scorer server adds to a step, on one machine's loopback.

    python -m benchmarks.scorer_server                          # under 3 minutes
    python -m benchmarks.scorer_server --rows 1 --prefix 4096
    python -m benchmarks.scorer_server --out benchmarks/results # scorer_server.json and .txt

A small random critic, so that little of a step is its forward, is loaded here and served by
`guided-decode scorer` in a process of its own. Both score the same rows, which grow by a token a
step, and take turns in going first. "added" is the median of the steps' differences; "wire" is
what of a remote step was not spent in the server's scorer, and is what the bound is for: the same
forward takes longer in a process that had to wake up for it, beside one that fills the caches.
Nothing is reported where the answers differ. Clocks are unsure on a machine that does other work:
the load average stands beside the figures.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForTokenClassification
from transformers.utils import logging as transformers_logging

from benchmarks.report import WIDTH, environment
from guided_decode import PrefixHandle, Scorer, load_scorer
from guided_decode.checkpoints.loading import UnknownPolicyWarning
from guided_decode.scoring.remote import RemoteScorer

# A step may cost so much more than it does here.
BASE_SECONDS, ROW_SECONDS = 1e-3, 15e-6
_WARM_STEPS = 10
_LARGEST_DIFFERENCE = 1e-4
_VOCAB = 32_000


@dataclass(frozen=True)
class Case:
    """rows: of a step; prefix: tokens of each at the start; k: candidates of each."""

    rows: int
    prefix: int
    k: int

    @property
    def allowed(self) -> float:
        """Seconds that a step may take longer."""
        return BASE_SECONDS + ROW_SECONDS * self.rows


@dataclass(frozen=True)
class Result:
    """Seconds of each step, by who scored it, and those of them in the server's scorer; bytes
    that a step sent and received."""

    case: Case
    local: list[float]
    remote: list[float]
    in_scorer: list[float]
    difference: float
    bytes_sent: float
    bytes_received: float

    @property
    def added(self) -> list[float]:
        return [theirs - own for own, theirs in zip(self.local, self.remote, strict=True)]

    @property
    def wire(self) -> list[float]:
        return [whole - own for own, whole in zip(self.in_scorer, self.remote, strict=True)]

    @property
    def met(self) -> bool:
        return statistics.median(self.wire) <= self.case.allowed


class DisagreementError(Exception):
    """The server's answers are not the local scorer's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that were asked for; exit code 1 where the answers differ."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    longest = max(options.prefix) + options.steps + _WARM_STEPS + 2
    about = environment(
        " ".join(["python -m benchmarks.scorer_server", *given]),
        {"layers": options.layers, "hidden": options.hidden, "dtype": "float32"},
        ("pyzmq", "msgspec"),
    )
    cases = [Case(*size) for size in itertools.product(options.rows, options.prefix, options.k)]
    cache = max(c.rows * (c.prefix + (options.steps + _WARM_STEPS) * (c.k + 1)) for c in cases)
    with both(options, longest, cache) as (local, remote):
        try:
            results = [run_case(local, remote, case, options.steps) for case in cases]
        except DisagreementError as error:
            console.print(f"[red]nothing is reported:[/] {error}")
            return 1
    console.print(table(results))
    if options.out:
        write(results, about, options.out)
    return 0


@contextmanager
def both(
    options: argparse.Namespace, longest: int, cache_tokens: int
) -> Iterator[tuple[Scorer, RemoteScorer]]:
    """The critic in this process, and a client of one that is served."""
    with tempfile.TemporaryDirectory(prefix="guided-decode-benchmark-") as folder:
        save_critic(Path(folder), options.layers, options.hidden, longest)
        own: dict[str, Any] = {"kind": "verl-critic", "cache_tokens": cache_tokens}
        words = ["--kind", "verl-critic", "--cache-tokens", str(cache_tokens), "--device", "cpu"]
        server = subprocess.Popen(
            [sys.executable, "-m", "guided_decode.cli", "scorer", folder, *words, "--listen",
             "tcp://127.0.0.1:0"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            said = re.search(r"is served at (\S+):", server.stdout.readline())
            assert said is not None, "the server did not start"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnknownPolicyWarning)
                local, remote = load_scorer(folder, **own), load_scorer(said[1])
            assert isinstance(remote, RemoteScorer)
            yield local, remote
            remote.close()
        finally:
            server.terminate()
            server.wait(30)


def save_critic(folder: Path, layers: int, hidden: int, positions: int) -> None:
    """A random critic."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        num_labels=1,
    )
    LlamaForTokenClassification(config).eval().save_pretrained(folder)


@torch.no_grad()
def run_case(local: Scorer, remote: RemoteScorer, case: Case, steps: int) -> Result:
    """Times a case, and holds every answer to the local one.

    Raises DisagreementError: they differ by more than float32's rounding.
    """
    generator = torch.Generator().manual_seed(case.rows * case.prefix)
    prompts = torch.randint(0, _VOCAB, (case.rows, case.prefix), generator=generator)
    handles = [PrefixHandle(prompt) for prompt in prompts]
    seconds: dict[Any, list[float]] = {local: [], remote: []}
    worst, before, scored, in_scorer = 0.0, remote.wire_counters(), 0.0, []
    sent = received = 0
    for step in range(-_WARM_STEPS, steps):
        candidates = torch.randint(0, _VOCAB, (case.rows, case.k), generator=generator)
        before, answers = remote.wire_counters(), {}
        for scorer in (local, remote) if step % 2 else (remote, local):
            begun = time.perf_counter()
            answers[scorer] = scorer.score(handles, candidates)
            if step >= 0:
                seconds[scorer].append(time.perf_counter() - begun)
        after = remote.wire_counters()
        now = remote.server_counters()["scorer_seconds"]
        if step >= 0:
            in_scorer.append(now - scored)
            sent += after["bytes_sent"] - before["bytes_sent"]
            received += after["bytes_received"] - before["bytes_received"]
        scored = now
        worst = max(worst, *_differences(answers[local], answers[remote]))
        if not worst <= _LARGEST_DIFFERENCE:
            raise DisagreementError(f"{case} differs by {worst:.2g} at step {step}")
        for handle, token in zip(handles, candidates[:, 0].tolist(), strict=True):
            handle.append(token)
    return Result(
        case, seconds[local], seconds[remote], in_scorer, worst, sent / steps, received / steps
    )


def _differences(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]


def table(results: Sequence[Result]) -> Table:
    """Milliseconds a step."""
    made = Table(
        title="Milliseconds a step, and what the server adds",
        caption="Medians of the steps; in brackets the tenth and the ninetieth of a hundred.",
    )
    for name in ("rows", "prefix", "k", "local", "remote", "added", "wire", "allowed",
                 "bytes sent", "received", "met"):  # fmt: skip
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        case = result.case
        made.add_row(
            str(case.rows), str(case.prefix), str(case.k),
            *(f"{1e3 * statistics.median(each):.2f}" for each in (result.local, result.remote)),
            *map(_spread, (result.added, result.wire)),
            f"{1e3 * case.allowed:.2f}", f"{result.bytes_sent:,.0f}",
            f"{result.bytes_received:,.0f}", "yes" if result.met else "no",
        )  # fmt: skip
    return made


def _spread(seconds: Sequence[float]) -> str:
    low, *_, high = statistics.quantiles(seconds, n=10)
    return f"{1e3 * statistics.median(seconds):.2f} ({1e3 * low:.2f}–{1e3 * high:.2f})"


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """scorer_server.json and scorer_server.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        asdict(r.case)
        | {
            "steps": len(r.added),
            "local_ms": round(1e3 * statistics.median(r.local), 3),
            "remote_ms": round(1e3 * statistics.median(r.remote), 3),
            "wire_ms": round(1e3 * statistics.median(r.wire), 3),
            "added_ms": round(1e3 * statistics.median(r.added), 3),
            "allowed_ms": round(1e3 * r.case.allowed, 3),
            "met": r.met,
            "bytes_sent": round(r.bytes_sent),
            "bytes_received": round(r.bytes_received),
            "largest_difference": r.difference,
        }
        for r in results
    ]
    text = json.dumps(about | {"cases": cases}, indent=1, ensure_ascii=False)
    (folder / "scorer_server.json").write_text(text + "\n")
    with (folder / "scorer_server.txt").open("w") as file:
        console = Console(file=file, width=WIDTH, color_system=None)
        load = f"load average {about['load_average']} on {about['cores']} cores"
        console.print(about["date"], about["command"], load, sep=" · ")
        console.print(table(results))


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scorer_server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 4096], help="tokens of each")
    parser.add_argument("--k", type=int, nargs="+", default=[16], help="candidates a row")
    parser.add_argument("--steps", type=int, default=200, help="of each case that are timed")
    parser.add_argument("--layers", type=int, default=2, help="of the critic")
    parser.add_argument("--hidden", type=int, default=32, help="its size")
    parser.add_argument("--out", type=Path, help="folder for scorer_server.json and .txt")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
