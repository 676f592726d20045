"""What a head on the policy's own trunk costs in `generate`, on a CPU.

    python -m benchmarks.trunk_lookahead                          # under 5 minutes
    python -m benchmarks.trunk_lookahead --batch 1 --prefix 512 --k 8
    python -m benchmarks.trunk_lookahead --out benchmarks/results # trunk_lookahead.json and .txt

The random policy of `benchmarks.lookahead` decodes greedily in three ways: `generate` alone; with
TrunkLookahead, one forward a token, k rows wide; with GuidedDecoding and the same head as a critic
beside the policy. The two guided ways must give the same tokens before anything is timed; the ways
take turns within each round, and ratios are taken within it.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.baselines import Models, Shape
from benchmarks.pairs import Case, Ratio
from benchmarks.report import environment
from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import GuidedDecoding, TrunkLookahead

TOKENS = 24
# A step of generate's loop is what tokens beyond the first few cost.
_FIRST = 4

Way: TypeAlias = TrunkLookahead | GuidedDecoding | None


@dataclass(frozen=True)
class Result:
    """Seconds a token of each way, by round."""

    case: Case
    seconds: dict[str, list[float]]

    def over_plain(self, way: str) -> Ratio:
        return Ratio.of(self.seconds[way], self.seconds["plain"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that were asked for; exit code 1 where the guided ways do not agree."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    shape = Shape()
    about = environment(
        " ".join(["python -m benchmarks.trunk_lookahead", *given]),
        asdict(shape) | {"dtype": "float32"},
    )
    policy = Models.random(shape, cache_tokens=1).policy
    torch.manual_seed(1)
    head = nn.Linear(shape.hidden, 1)
    sizes = itertools.product(options.batch, options.prefix, options.k)
    console = Console(width=110)
    results = []
    for size in sizes:
        result = run(policy, head, Case(*size), options.rounds)
        if result is None:
            console.print(f"[red]nothing is reported:[/] {Case(*size)}: other tokens")
            return 1
        results.append(result)
    console.print(table(results))
    if options.out:
        write(results, about, options.out)
    return 0


def run(policy: Any, head: nn.Module, case: Case, rounds: int) -> Result | None:
    """The case's seconds a token; None where the guided ways give different tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab = policy.config.vocab_size
    prompts = torch.randint(3, vocab, (case.batch, case.prefix), generator=generator)
    config = GuidanceConfig(beta=1.0, top_k=case.k)
    room = case.batch * (case.prefix + (TOKENS + 2) * (case.k + 2))
    load = {"kind": "trunk-head", "head": head, "cache_tokens": room}
    ways: dict[str, Way] = {
        "plain": None,
        "trunk": TrunkLookahead(load_scorer(policy, **load), config),
        "two models": GuidedDecoding(load_scorer(policy, **load), config),
    }
    tokens = {name: generate(policy, prompts, way, TOKENS) for name, way in ways.items()}
    if not torch.equal(tokens["trunk"], tokens["two models"]):
        return None
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(seconds_a_token(policy, prompts, ways[name]))
    return Result(case, seconds)


def seconds_a_token(policy: Any, prompts: Tensor, way: Way) -> float:
    """What the last tokens took: a long call less a short one, both from an empty cache."""
    taken = []
    for tokens in (TOKENS, _FIRST):
        if way is not None:
            way.scorer.cache.clear()
        begun = time.perf_counter()
        generate(policy, prompts, way, tokens)
        taken.append(time.perf_counter() - begun)
    return (taken[0] - taken[1]) / (TOKENS - _FIRST)


def generate(policy: Any, prompts: Tensor, way: Way, tokens: int) -> Tensor:
    """Prompts and `tokens` new tokens each, greedily."""
    answer: Tensor = policy.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        custom_generate=way,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return answer


def table(results: Sequence[Result]) -> Table:
    """Milliseconds a token, and ratios as median (least–most)."""
    made = Table(
        title="Milliseconds a token of `generate`, a value head on the policy's own trunk",
        caption="Over plain: median of the rounds' ratios (least–most).",
    )
    for name in ("batch", "prefix", "k", "plain", "trunk", "two models", "trunk / plain",
                 "two models / plain"):  # fmt: skip
        made.add_column(name, justify="right", no_wrap=True)
    for result in results:
        times = [f"{1e3 * statistics.median(each):.1f}" for each in result.seconds.values()]
        ratios = [result.over_plain(way) for way in ("trunk", "two models")]
        shown = [f"{r.median:.2f} ({r.least:.2f}–{r.most:.2f})" for r in ratios]
        made.add_row(*map(str, asdict(result.case).values()), *times, *shown)
    return made


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """trunk_lookahead.json and .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    content = about | {"results": [asdict(result) for result in results]}
    (folder / "trunk_lookahead.json").write_text(json.dumps(content, indent=1) + "\n")
    with (folder / "trunk_lookahead.txt").open("w") as file:
        console = Console(file=file, width=110, color_system=None)
        console.print(about["date"], about["command"], sep=" · ")
        console.print(table(results))


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trunk_lookahead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--prefix", type=int, nargs="+", default=[512], help="prompt tokens")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16], help="candidates a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for trunk_lookahead.json and .txt")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
