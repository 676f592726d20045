"""Timing of device work: replayed graphs over rotating inputs, medians and spread, launches."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

# Replays of a timing, at most; fewer where they take longer than this.
_REPLAYS, _SECONDS = 30, 0.15
# Inputs rotate over so many bytes, several times any L2 cache.
ROTATED_BYTES = 320 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median over the replays, with the extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def rotations(bytes_of_one: float, most: int = 64) -> int:
    """How many input sets keep a call from finding its own in the cache."""
    return max(1, min(most, -(-ROTATED_BYTES // max(1, int(bytes_of_one)))))


def timed(calls: Sequence[Call]) -> Timing:
    """Seconds of one call, where each of `calls` is the same work on other inputs.

    On a GPU they are captured into one graph, which is replayed; what cannot be captured is
    launched from the host.
    """
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return Timing.of([_host_seconds(calls) for _ in range(3)])
    torch.cuda.synchronize()
    run = _captured(calls)
    one = _event_seconds(run)
    count = max(3, min(_REPLAYS, int(_SECONDS / max(one, 1e-6))))
    return Timing.of([_event_seconds(run) / len(calls) for _ in range(count)])


def _host_seconds(calls: Sequence[Call]) -> float:
    begun = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begun) / len(calls)


def _event_seconds(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _captured(calls: Sequence[Call]) -> Call:
    def every() -> None:
        for call in calls:
            call()

    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            every()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
    except RuntimeError:
        torch.cuda.synchronize()
        return every
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


@dataclass(frozen=True)
class Launches:
    """What the profiler saw of some calls: kernels on the device, their seconds, by name."""

    kernels: int
    busy: float
    by_name: dict[str, tuple[int, float]]


def launches(call: Call, times: int = 1) -> Launches | None:
    """Kernels that a call launches, copies and fills left out; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    by_name: dict[str, tuple[int, float]] = {}
    for event in seen.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if not on_device or event.name.startswith(("Memcpy", "Memset")):
            continue
        count, seconds = by_name.get(event.name, (0, 0.0))
        by_name[event.name] = (count + 1, seconds + event.time_range.elapsed_us() / 1e6)
    kernels = sum(count for count, _ in by_name.values())
    busy = sum(seconds for _, seconds in by_name.values())
    return Launches(kernels, busy, by_name) if kernels else None
