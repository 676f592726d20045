"""Capturing a CUDA graph so that an attempt that fails leaves the process as it was."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# What torch says of an operation for which the host waits, in its synchronisation debug mode.
_WAITS = "called a synchronizing CUDA operation"


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises RuntimeError at the end if this thread waited for the device, which no graph can do.

    torch's debug mode belongs to the process: it warns here instead of raising, and warnings of
    other threads, which may wait, are dropped.
    """
    ours, waited = threading.get_ident(), []
    before, mode = warnings.showwarning, torch.cuda.get_sync_debug_mode()

    def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
        if _WAITS not in str(message):
            before(message, category, *where, **more)
        elif threading.get_ident() == ours:
            waited.append(f"{where[0]}:{where[1]}" if len(where) > 1 else str(message))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_WAITS)
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waited:
        raise RuntimeError(f"the host waits for the device at {', '.join(dict.fromkeys(waited))}")


def captured(
    run: Callable[[], object], memory: Any, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """A graph of `run` on the current device, its buffers in the pool `memory`.

    Raises RuntimeError: it cannot be captured.
    """
    index = torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    untouched = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads of a server go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            run()
    except BaseException:
        # Where its end fails, torch leaves the generator and the allocator as if it went on: the
        # next sample would raise, and the next tensor lie in the graph's memory.
        generator.graphsafe_set_state(untouched)
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, memory)
        raise
    return graph
