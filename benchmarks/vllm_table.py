"""What the turns in a vLLM engine gave: a table, JSON, and the targets."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.vllm_engines import Timing
from benchmarks.vllm_plan import TOKENS

TARGET_UNUSED, TARGET_HOST = 1.05, 60.0
# Where the model decides, and not Python: by the trunk over by a critic of its size, by the trunk
# (k 4, one request) and by that critic (k 8, eight requests) over plain.
TARGET_TRUNK, TARGET_TRUNK_ALONE, TARGET_CRITIC = 0.8, 1.5, 2.3
WIDTH = 150
FILES = ("vllm_throughput.json", "vllm_throughput.txt")
Verdicts = Sequence[tuple[str, bool]]


@dataclass
class Cell:
    """One concurrency and prompt length: the turns of each way, round by round.

    full: whether the KV cache holds but a part of the requests.
    near_ties: unguided requests that got other tokens in the check, from a near tie on.
    gate: of the way that has one, a probability.
    """

    concurrency: int
    prompt: int
    turns: dict[str, list[Timing]] = field(default_factory=dict)
    full: bool = False
    near_ties: int = 0
    gate: float | None = None

    def __str__(self) -> str:
        full = ", full KV cache" if self.full else ""
        return f"prompts of {self.prompt}, concurrency {self.concurrency}{full}"

    def rate(self, way: str) -> float:
        return statistics.median(t.tokens / t.seconds for t in self.turns[way])

    def slowdown(self, way: str) -> list[float]:
        """Seconds over the plain engine's, round by round."""
        return self.ratios(way, "plain")

    def ratios(self, way: str, other: str) -> list[float]:
        """Seconds of one way over another's, round by round."""
        pairs = zip(self.turns[way], self.turns[other], strict=True)
        return [mine.seconds / theirs.seconds for mine, theirs in pairs]

    def latency(self, way: str) -> float | None:
        """Median milliseconds between two tokens of an unguided request."""
        gaps = [gap for turn in self.turns[way] for gap in turn.gaps]
        return 1e3 * statistics.median(gaps) if gaps else None

    def host(self, way: str) -> float | None:
        values = [t.host_microseconds for t in self.turns[way] if t.host_microseconds is not None]
        return statistics.median(values) if values else None

    def gated(self, way: str) -> float | None:
        """The share of guided rows that the gate let pass."""
        values = [t.gated for t in self.turns[way] if t.gated is not None]
        return statistics.median(values) if values else None

    def preemptions(self, way: str) -> float | None:
        """Of a turn, the median; None where vLLM did not count them."""
        values = [t.preemptions for t in self.turns[way] if t.preemptions is not None]
        return statistics.median(values) if values else None


def verdicts(
    cells: Sequence[Cell], gpu: bool = False, real_shape: bool = False
) -> list[tuple[str, bool]]:
    """The targets, each with what was measured; host work is told apart on a CPU only.

    real_shape: of the policy, beside which the critic is of that shape too on a CPU.
    """
    found = []
    for cell in cells:
        if "unused" in cell.turns:
            unused = statistics.median(cell.slowdown("unused"))
            rounds = len(cell.turns["plain"])
            found.append((f"{cell}: loaded but unused ≤ {TARGET_UNUSED}× plain: {unused:.3f} "
                          f"({rounds} pairs)", unused <= TARGET_UNUSED))  # fmt: skip
        # All 32 rows guided.
        ways = [way for way in cell.turns if way.startswith("k ")]
        hosts = [host for way in ways if (host := cell.host(way)) is not None]
        if cell.concurrency == 32 and hosts and not gpu:
            found.append((f"{cell}: host work < {TARGET_HOST:.0f} µs a row: {max(hosts):.0f}",
                          max(hosts) < TARGET_HOST))  # fmt: skip
        if real_shape and not gpu and not cell.full:
            found += _of_a_real_shape(cell)
    return found


def _of_a_real_shape(cell: Cell) -> list[tuple[str, bool]]:
    """Targets of guidance where the forwards decide."""
    wanted = [(f"trunk k {k}", f"k {k}", TARGET_TRUNK) for k in (4, 8)]
    if cell.concurrency == 1:
        wanted.append(("trunk k 4", "plain", TARGET_TRUNK_ALONE))
    if cell.concurrency == 8:
        wanted.append(("k 8", "plain", TARGET_CRITIC))
    found = []
    for way, other, target in wanted:
        if {way, other} <= cell.turns.keys():
            ratio = statistics.median(cell.ratios(way, other))
            found.append((f"{cell}: {way} ≤ {target}× {other}: {ratio:.2f}", ratio <= target))
    return found


def show(cells: Sequence[Cell], title: str, found: Verdicts, console: Console) -> None:
    """The table, and the targets."""
    table = Table(
        title=f"{title}, {TOKENS} tokens a request",
        caption="seconds / plain: median of the rounds' ratios (least–most). Latency: median gap "
        "between two tokens of an unguided request. Host: microseconds a guided row and step in "
        "the processor and the scorer, without the scorer's forwards; on a GPU with the waits for "
        "it. Preempted: requests in a turn, by vLLM's count.",
    )
    counted = any(cell.preemptions(way) is not None for cell in cells for way in cell.turns)
    names = ["prompt", "concurrency", "way", "tokens/s", "ms a token", "seconds / plain",
             "unguided latency ms", "host µs a row"]  # fmt: skip
    for name in [*names, *(["preempted"] if counted else [])]:
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for cell in cells:
        for way in cell.turns:
            ratio, latency, host = cell.slowdown(way), cell.latency(way), cell.host(way)
            row = [
                str(cell.prompt), f"{cell.concurrency}{' full' if cell.full else ''}", way,
                f"{cell.rate(way):,.0f}", f"{1e3 * cell.concurrency / cell.rate(way):.2f}",
                f"{statistics.median(ratio):.2f} ({min(ratio):.2f}–{max(ratio):.2f})",
                "" if latency is None else f"{latency:.2f}", "" if host is None else f"{host:.0f}",
            ]  # fmt: skip
            preempted = cell.preemptions(way)
            table.add_row(*row, *([] if preempted is None else [f"{preempted:g}"]))
    console.print(table)
    for text, met in found:
        console.print(f"{'met' if met else 'not met':>7}  {text}")


def write(
    cells: Sequence[Cell], about: dict[str, Any], title: str, found: Verdicts, folder: Path
) -> None:
    """vllm_throughput.json and .txt."""
    folder.mkdir(parents=True, exist_ok=True)
    content = about | {
        "cells": [
            {"prompt": c.prompt, "concurrency": c.concurrency, "full": c.full}
            | {"near_ties": c.near_ties}
            | ({} if c.gate is None else {"gate": c.gate})
            | {way: _numbers(c, way) for way in c.turns}
            for c in cells
        ],
        "targets": [{"target": text, "met": met} for text, met in found],
    }
    numbers, text = (folder / name for name in FILES)
    numbers.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    with text.open("w") as file:
        console = Console(file=file, width=WIDTH, color_system=None)
        console.print(about["date"], about["command"], sep=" · ")
        show(cells, title, found, console)


def withdraw(folder: Path) -> None:
    """Removes what was written, since a later cell showed that the engines disagree."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _numbers(cell: Cell, way: str) -> dict[str, Any]:
    return {
        "tokens_per_second": round(cell.rate(way), 1),
        "seconds_over_plain": [round(ratio, 4) for ratio in cell.slowdown(way)],
        "unguided_latency_ms": cell.latency(way),
        "host_microseconds_a_row": cell.host(way),
        "gated_share": cell.gated(way),
        "preemptions": cell.preemptions(way),
    }
