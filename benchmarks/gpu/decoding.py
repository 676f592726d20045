"""The decoding part: cells in the order of their worth, each way beside its floor."""

import gc
import statistics
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.agreement import agreements, kind_of
from benchmarks.gpu.budget import Deadline
from benchmarks.gpu.cells import Cell, Setup, gigabytes, k_of
from benchmarks.gpu.floors import LLAMA2_13B, LLAMA3_8B, Rates, Size, step_floor, trunk_floor
from benchmarks.gpu.loop import GATE_PERIOD, Lane, part_seconds, take_turns
from benchmarks.gpu.models import Models
from benchmarks.gpu.rivals import GENERATED, generate_seconds
from benchmarks.gpu.timing import launches

Record = dict[str, Any]

# Of the card's memory; the rest is the allocator's, the libraries' and the graphs'.
_MOST_MEMORY = 0.92
_GUIDED = ("k 4", "k 8", "k 16", "k 32")
_GRID = ("plain", *_GUIDED)
_TRUNK = ("plain", "pruning", "trunk k 4", "trunk k 8", "trunk k 16")
_ROUNDS = 3


def _grid(size: Size, batch: int, prefix: int, *more: str) -> Cell:
    return Cell(size, batch, prefix, (*_GRID, *more))


# Against copies of the critic's cache: 110 GB; 57 GB with half the prefix.
COPIED = Cell(LLAMA3_8B, 8, 4096, ("plain", "k 16", "copied k 16"))
COPIED_ON_A_SMALL_CARD = replace(COPIED, prefix=2048)
# Where a step's time goes: with the profiler, in the process that has the models.
_INSIDE = Cell(LLAMA2_13B, 1, 512, ("plain", "k 16", "trunk k 16"))
# A stage is a process of its own, in which the cells with targets come first.
STAGES: dict[str, tuple[Cell, ...]] = {
    "13B targets": (
        Cell(LLAMA2_13B, 1, 512, ("plain", "k 16", "gated k 16")),
        Cell(LLAMA2_13B, 1, 512, ("plain", "k 16", "unmerged k 16")),
        _INSIDE,
        Cell(LLAMA2_13B, 1, 512, ("plain", "pruning", "trunk k 16")),
        _grid(LLAMA2_13B, 1, 512, "generate"),
    ),
    "8B": (
        COPIED,
        COPIED_ON_A_SMALL_CARD,
        *(Cell(LLAMA3_8B, batch, 512, _TRUNK) for batch in (1, 4, 8)),
        _grid(LLAMA3_8B, 1, 512, "gated k 16", "generate"),
        _grid(LLAMA3_8B, 16, 512, "gated k 16", "generate"),
        _grid(LLAMA3_8B, 16, 4096),
        _grid(LLAMA3_8B, 1, 4096, "generate"),
        _grid(LLAMA3_8B, 64, 512, "generate"),
        Cell(LLAMA3_8B, 1, 512, ("plain", "k 16", "copied k 16", "recomputed k 16")),
        Cell(LLAMA3_8B, 4, 512, ("plain", "k 16", "copied k 16", "recomputed k 16")),
        _grid(LLAMA3_8B, 4, 512, "gated k 16", "generate"),
        _grid(LLAMA3_8B, 4, 4096, "generate"),
        _grid(LLAMA3_8B, 64, 4096),
        Cell(LLAMA3_8B, 1, 4096, _TRUNK),
        Cell(LLAMA3_8B, 1, 4096, ("plain", "k 16", "copied k 16")),
    ),
    "13B": (
        _grid(LLAMA2_13B, 4, 512, "gated k 16", "generate"),
        _grid(LLAMA2_13B, 16, 512, "generate"),
        _grid(LLAMA2_13B, 1, 4096, "generate"),
        _grid(LLAMA2_13B, 4, 4096),
        Cell(LLAMA2_13B, 1, 512, ("plain", "k 16", "recomputed k 16")),
        _grid(LLAMA2_13B, 64, 512),
        Cell(LLAMA2_13B, 4, 512, ("plain", "k 16", "recomputed k 16")),
        _grid(LLAMA2_13B, 16, 4096),
        _grid(LLAMA2_13B, 64, 4096),
    ),
}
# Begun only while so many seconds are left.
_CELL_SECONDS = 12.0


@torch.no_grad()
def agreement() -> Iterator[Record]:
    """Every way against full recomputation, on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield from agreements(device, capture=device == "cuda")


@torch.no_grad()
def run(
    stage: str, rates: Rates, deadline: Deadline, without: Collection[str] = ()
) -> Iterator[Record]:
    """The records of a stage: ways that were timed, and cells that were not, with the reason.

    without: kinds of ways that do not agree with full recomputation, and are not timed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: Models | None = None
    for whole in STAGES[stage]:
        cell = replace(whole, ways=tuple(w for w in whole.ways if kind_of(w) not in without))
        if cell.ways != whole.ways:
            left_out = tuple(way for way in whole.ways if way not in cell.ways)
            yield not_run(cell, "it does not agree with full recomputation", left_out)
        reason = _not_run(cell, deadline, memory_gigabytes())
        if reason is None:
            if models is None:
                models = Models.random(cell.size, device, torch.bfloat16)
            try:
                yield from run_cell(models, cell, rates, inside=whole is _INSIDE)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            _free()
        if reason is not None:
            yield not_run(cell, reason, cell.ways)


def not_run(cell: Cell, reason: str, ways: tuple[str, ...]) -> Record:
    """The record of ways of a cell that were not timed."""
    return {"kind": "not run", "what": str(cell), "ways": ways, "reason": reason}


def memory_gigabytes() -> float:
    """What a cell may take of this device's memory; any amount where there is none."""
    if not torch.cuda.is_available():
        return float("inf")
    return _MOST_MEMORY * torch.cuda.mem_get_info()[1] / 1e9


def _not_run(cell: Cell, deadline: Deadline, most: float) -> str | None:
    """Why a cell is left out, on a card that gives `most` gigabytes; None where it is run."""
    if not set(cell.ways) - {"plain"}:
        return "no way is left"
    needed = gigabytes(cell, _all_steps(cell))
    if needed > most:
        return f"it needs {needed:.0f} GB, more than this card's {most:.0f}"
    if cell == COPIED_ON_A_SMALL_CARD and gigabytes(COPIED, _all_steps(COPIED)) <= most:
        return "a larger card runs it with twice the prefix"
    if not deadline.allows(_CELL_SECONDS):
        return "the time was up"
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _steps(cell: Cell) -> int:
    """Of a round."""
    if any(way.startswith("gated") for way in cell.ways):
        return GATE_PERIOD
    return GATE_PERIOD if cell.batch <= 4 else 5 if cell.batch <= 16 else 3


def _warm(cell: Cell) -> int:
    # Gated steps differ, and each shape is captured when it first comes.
    return 2 * GATE_PERIOD if _steps(cell) == GATE_PERIOD else 4


def _all_steps(cell: Cell) -> int:
    """The most of one way, with those that look inside."""
    return _warm(cell) + _ROUNDS * _steps(cell) + (12 if cell.batch == 1 else 0)


def run_cell(models: Models, cell: Cell, rates: Rates, *, inside: bool = False) -> Iterator[Record]:
    """The records of a cell's ways, and with `inside` where a guided step's time goes."""
    looped = tuple(way for way in cell.ways if way != "generate")
    setup = Setup(models, cell.batch, cell.prefix, looped, steps=_all_steps(cell))
    slow = [way for way in looped if way.startswith(("copied", "recomputed"))]
    lanes = {way: setup.lane(way) for way in looped if way not in slow}
    take_turns(list(lanes.values()), _ROUNDS, _steps(cell), _warm(cell))
    found = {way: lane.by_round() for way, lane in lanes.items()}
    for way, lane in lanes.items():
        about = {"graphs": lane.graph_replays(), "merged": lane.merged}
        yield record_of(cell, way, found, rates) | about
    if inside:
        yield from _inside(cell, lanes)
    for way in slow:
        lane = setup.lane(way)
        # The first two capture the policy's graphs.
        take_turns([lane], _ROUNDS, 1 if way.startswith("recomputed") else 3, 3)
        found[way] = lane.by_round()
        about = {"graphs": lane.graph_replays(), "merged": lane.merged}
        del lane
        _free()
        yield record_of(cell, way, found, rates) | about
    if "generate" in cell.ways:
        seconds = generate_seconds(models.policy, setup.prompts("plain"), GENERATED)
        found["generate"] = [statistics.median(seconds[i::_ROUNDS]) for i in range(_ROUNDS)]
        yield record_of(cell, "generate", found, rates) | {"graphs": None, "merged": ()}


def record_of(cell: Cell, way: str, found: dict[str, list[float]], rates: Rates) -> Record:
    """Milliseconds a step with their spread over the rounds, and what they stand beside."""
    rounds = found[way]
    k, size = k_of(way), cell.size
    floor = None
    if way.startswith("trunk"):
        floor = trunk_floor(size, cell.batch, cell.prefix, k or 1, rates)
    elif not way.startswith(("copied", "recomputed", "gated")):
        floor = step_floor(size, cell.batch, cell.prefix, k, rates)
    seconds = statistics.median(rounds)
    return {
        "kind": "decoding",
        "model": size.name,
        "batch": cell.batch,
        "prefix": cell.prefix,
        "way": way,
        "ms": 1e3 * seconds,
        "ms_least": 1e3 * min(rounds),
        "ms_most": 1e3 * max(rounds),
        "floor_ms": None if floor is None else 1e3 * floor,
        "over_floor": None if floor is None else seconds / floor,
        "over_plain": _over(rounds, found.get("plain")),
        "over_guided": _over(rounds, found.get(f"k {k}")),
    }


def _over(rounds: list[float], others: list[float] | None) -> float | None:
    if not others:
        return None
    if len(rounds) == len(others):
        return statistics.median(a / b for a, b in zip(rounds, others, strict=True))
    return statistics.median(rounds) / statistics.median(others)


def _inside(cell: Cell, lanes: dict[str, Lane]) -> Iterator[Record]:
    """Where a step's time goes: by part, on the device, and waits of the host."""
    for way in ("plain", "k 16", "trunk k 16"):
        if way not in lanes:
            continue
        lane = lanes[way]
        record: Record = {"kind": "inside", "cell": str(cell), "way": way}
        parts = part_seconds(lane)
        record["parts_ms"] = {part: 1e3 * seconds for part, seconds in parts.items()}
        try:
            record |= _on_device(lane)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:300]
        yield record


def _on_device(lane: Lane, steps: int = 4) -> Record:
    seen = launches(lane.step, steps)
    if seen is None:
        return {}
    slowest = sorted(seen.by_name.items(), key=lambda item: -item[1][1])[:12]
    return {
        "kernels_a_step": seen.kernels / steps,
        "device_ms": 1e3 * seen.busy / steps,
        "host_waits": _host_waits(lane),
        "slowest": [
            {"name": name[:90], "count": count / steps, "ms": 1e3 * seconds / steps}
            for name, (count, seconds) in slowest
        ],
    }


def _host_waits(lane: Lane) -> int:
    """Synchronising calls of a step, as torch's debug mode counts them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            lane.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
