"""What a token of PPO-MCTS costs on a CPU, against a version that copies caches a node.

    python -m benchmarks.mcts                          # under 10 minutes
    python -m benchmarks.mcts --simulations 20 --prefix 512
    python -m benchmarks.mcts --out benchmarks/results # writes mcts.json and mcts.txt

A random policy and critic in float32, at the paper's defaults (k 10, c_puct 8, no KL term, the most
visited token). "naive" is benchmarks/naive_mcts.py; "ours" is the package's faithful preset, one
leaf a forward; "batched" evaluates several leaves in one forward. Ours and naive must take every
next token equally often in every tree, or nothing is reported. The prompt but its last token is in
our caches before the clock starts: of a long response its forward is a small part; naive forwards
the whole prefix for each token, as the published code does. Ways take turns within each round.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.baselines import EOS, Models, Shape
from benchmarks.naive_mcts import NaiveSearch
from benchmarks.pairs import DisagreementError, Ratio
from benchmarks.report import WIDTH, environment
from guided_decode.scoring.critic import CriticScorer
from guided_decode.search import MCTS, LocalGenerator, ScorerJudge, load_generator, ppo_mcts, run

Visits = list[dict[int, int]]
TARGET = 3.0


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    simulations: int
    prefix: int

    def __str__(self) -> str:
        return f"{self.simulations} simulations, prefix {self.prefix}"


@dataclass(frozen=True)
class Result:
    """Seconds a token of each way, by round; tokens that ours forwarded a token of the response."""

    case: Case
    seconds: dict[str, list[float]]
    forwarded: dict[str, float]

    def faster(self, way: str) -> Ratio:
        return Ratio.of(self.seconds["naive"], self.seconds[way])

    @property
    def targets(self) -> list[tuple[str, float, bool]]:
        """What was asked for, what was measured, and whether that meets it."""
        own, batched = self.faster("ours").median, self.faster("batched").median
        found = [(f"{self.case}: one leaf a forward is faster than naive", own, own > 1)]
        if self.case.simulations == 20:
            asked = f"{self.case}: ≥ {TARGET:g}× faster than naive with batched leaves"
            found.append((asked, batched, batched >= TARGET))
        return found


class Search:
    """The package's search on its own caches."""

    def __init__(self, models: Models, generator: LocalGenerator) -> None:
        self.generator = generator
        self.scorer = CriticScorer(models.packed, models.head)
        self.judge = ScorerJudge(self.scorer, terminals=[EOS])

    def seconds(self, prompt: list[int], settings: MCTS, tokens: int) -> tuple[float, Visits]:
        """Seconds a token, and each tree's visits, with the prompt's beginning cached."""
        self.generator.policy.cache.clear()
        self.scorer.cache.clear()
        self.generator.policy.next_logits([prompt[:-1]])
        self.scorer.score([prompt[:-1]], torch.empty(1, 0, dtype=torch.int64))
        begun = time.perf_counter()
        result = run(ppo_mcts(prompt, settings, max_tokens=tokens), self.generator, self.judge)
        return (time.perf_counter() - begun) / tokens, result.details["visits"]

    def forwarded(self) -> int:
        """Tokens that both models have forwarded so far."""
        return self.generator.stats.prefix_tokens + self.scorer.stats.prefix_tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that were asked for; exit code 1 where the ways do not agree."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape()
    about = environment(
        " ".join(["python -m benchmarks.mcts", *given]),
        asdict(shape) | {"dtype": "float32", "k": options.k, "leaves": options.leaves},
    )
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    try:
        results = run_cases(shape, options, console)
    except DisagreementError as error:
        console.print(f"[red]nothing is reported:[/] {error}")
        return 1
    about["load_average_at_the_end"] = round(os.getloadavg()[0], 2)
    show(results, options, console)
    if options.out:
        write(results, about, options)
    return 0


@torch.no_grad()
def run_cases(shape: Shape, options: argparse.Namespace, console: Console) -> list[Result]:
    sizes = itertools.product(options.simulations, options.prefix)
    cases = [Case(*size) for size in sizes]
    room = max(options.prefix) + 2 * options.tokens * (max(options.simulations) + 2) + 8
    models = Models.random(shape, cache_tokens=room)
    own = Search(models, load_generator(models.policy, eos_token_ids=[EOS], cache_tokens=room))
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            results.append(run_case(models, own, case, options))
            progress.advance(task)
    return results


def run_case(models: Models, own: Search, case: Case, options: argparse.Namespace) -> Result:
    """Times all ways in rounds, each on a prompt of its own.

    Raises DisagreementError: naive and ours grew different trees.
    """
    generator = torch.Generator().manual_seed(case.prefix)
    vocab, rounds = models.policy.config.vocab_size, options.rounds
    prompts = torch.randint(3, vocab, (rounds + 1, case.prefix), generator=generator).tolist()
    settings = replace(MCTS.published(case.simulations), k=options.k)
    ways = {"ours": settings, "batched": replace(settings, leaves=options.leaves)}
    seconds: dict[str, list[float]] = {name: [] for name in ("naive", *ways)}
    forwarded = dict.fromkeys(ways, 0)
    order = list(seconds)
    for turn in range(-1, rounds):
        # The first round warms up: a token of each way, untimed.
        tokens = options.tokens if turn >= 0 else 1
        visits: dict[str, Visits] = {}
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            before = own.forwarded()
            if name == "naive":
                taken, visits[name] = naively(models, prompts[turn], settings, tokens)
            else:
                taken, visits[name] = own.seconds(prompts[turn], ways[name], tokens)
            if turn >= 0:
                seconds[name].append(taken)
                if name in forwarded:
                    forwarded[name] += own.forwarded() - before - 2 * (case.prefix - 1)
        check(case, visits, turn)
    count = rounds * options.tokens
    return Result(case, seconds, {name: total / count for name, total in forwarded.items()})


def naively(models: Models, prompt: list[int], settings: MCTS, tokens: int) -> tuple[float, Visits]:
    search = NaiveSearch(models, prompt, settings)
    begun = time.perf_counter()
    visits = [search.step() for _ in range(tokens)]
    return (time.perf_counter() - begun) / tokens, visits


def check(case: Case, visits: dict[str, Visits], turn: int) -> None:
    for i, (theirs, ours) in enumerate(zip(visits["naive"], visits["ours"], strict=True)):
        if theirs != ours:
            raise DisagreementError(
                f"{case}: ours and naive took other ways in the tree of token {i}, round {turn}: "
                f"{ours} and {theirs}"
            )
    for each in visits["batched"]:
        if sum(each.values()) != case.simulations:
            raise DisagreementError(f"{case}: batched leaves made {sum(each.values())} simulations")


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mcts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--simulations", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 512], help="prompt's tokens")
    parser.add_argument("--k", type=int, default=10, help="next tokens of a node")
    parser.add_argument("--leaves", type=int, default=8, help="of a batch")
    parser.add_argument("--tokens", type=int, default=3, help="of a response")
    parser.add_argument("--rounds", type=int, default=3, help="of each case")
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="folder for mcts.json and mcts.txt")
    return parser.parse_args(arguments)


def table(results: Sequence[Result], options: argparse.Namespace) -> Table:
    """Milliseconds a token, medians over the rounds, and ratios as median (least–most)."""
    made = Table(
        title=f"Milliseconds a token of PPO-MCTS, k {options.k}",
        caption=f"batched: up to {options.leaves} leaves a forward. Ratios: median of the rounds' "
        f"ratios (least–most), {options.rounds} rounds of {options.tokens} tokens. Forwarded: "
        "tokens of policy and critic for a token of the response, by ours; by batched.",
    )
    for name in ("simulations", "prefix", "naive", "ours", "batched", "naive / ours",
                 "naive / batched", "forwarded"):  # fmt: skip
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        ratios = [result.faster(way) for way in ("ours", "batched")]
        made.add_row(
            str(result.case.simulations),
            str(result.case.prefix),
            *(f"{1e3 * statistics.median(each):,.0f}" for each in result.seconds.values()),
            *(f"{r.median:.2f} ({r.least:.2f}–{r.most:.2f})" for r in ratios),
            "; ".join(f"{each:.1f}" for each in result.forwarded.values()),
        )
    return made


def show(results: Sequence[Result], options: argparse.Namespace, console: Console) -> None:
    """The table, and a line for each target."""
    console.print(table(results, options))
    for target, measured, met in (each for result in results for each in result.targets):
        colour, word = ("green", "met") if met else ("red", "not met")
        console.print(f"[{colour}]{word:>7}[/]  {target}: {measured:.2f}")


def write(results: Sequence[Result], about: dict[str, Any], options: argparse.Namespace) -> None:
    """mcts.json and mcts.txt."""
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        asdict(r.case)
        | {
            "milliseconds": {w: round(1e3 * statistics.median(s), 2) for w, s in r.seconds.items()},
            "naive_over_ours": asdict(r.faster("ours")),
            "naive_over_batched": asdict(r.faster("batched")),
            "tokens_forwarded_a_token": r.forwarded,
            "seconds": {way: [round(s, 6) for s in turns] for way, turns in r.seconds.items()},
        }
        for r in results
    ]
    targets = [
        {"target": target, "measured": measured, "met": met}
        for result in results
        for target, measured, met in result.targets
    ]
    written = about | {"cases": cases, "targets": targets}
    (folder / "mcts.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    with (folder / "mcts.txt").open("w") as file:
        console = Console(file=file, width=WIDTH, color_system=None)
        load = f"load average {about['load_average']} to {about['load_average_at_the_end']}"
        console.print(about["date"], about["command"], f"{about['threads']} threads", load,
                      sep=" · ")  # fmt: skip
        show(results, options, console)


if __name__ == "__main__":
    sys.exit(main())
