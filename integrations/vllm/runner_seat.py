"""The model runner that a processor belongs to, and blocks of its KV cache that no request has.

vLLM hands a processor neither. Both come from two methods that are wrapped here, and nowhere else
is vLLM patched: `initialize_kv_cache`, which is called with the runner and the size of its cache,
and `determine_available_memory`, from which the cache is sized. Where one of them is missing or
takes other arguments nothing is wrapped, and the reason is told.
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger("guided_decode")

_ORIGINAL = "_guided_decode_original"


class Patched(NamedTuple):
    """A method of vLLM's that is wrapped. takes: its first parameters, in the versions read."""

    owner: str
    name: str
    takes: tuple[str, ...]


READ_IN = ("0.32.0",)
RUNNERS = (
    Patched(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "initialize_kv_cache",
        ("self", "kv_cache_config", "is_profiling"),
    ),
    Patched(
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
        "initialize_kv_cache",
        ("self", "kv_cache_config", "is_profiling"),
    ),
)
# Replaced by `held_step` on a runner, one of the two on each.
HELD = (
    Patched(
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner", "_model_forward", ("self", "input_ids")
    ),
    Patched(
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner", "prepare_attn", ("self", "input_batch")
    ),
)
WORKERS = (
    Patched("vllm.v1.worker.gpu_worker.Worker", "determine_available_memory", ("self",)),
    Patched("vllm.v1.worker.cpu_worker.CPUWorker", "determine_available_memory", ("self",)),
)
_SIZES = "vllm.v1.core.kv_cache_utils.get_kv_cache_config_from_groups"


@dataclasses.dataclass(eq=False)
class RunnerSeat:
    """blocks: how many of the KV cache's are set aside. runner: None until its cache is there.
    first: the id of the first block that is set aside; they follow one another. has_room: whether
    the cache was sized with them in mind."""

    blocks: int
    runner: Any = None
    first: int = 0
    has_room: bool = False


# By the configuration of their engine, which runner and worker share with the processor.
_SEATS: "weakref.WeakValueDictionary[int, RunnerSeat]" = weakref.WeakValueDictionary()


def take_seat(vllm_config: Any, blocks: int) -> RunnerSeat:
    """A seat at the runner of this configuration, which is being built in this process.

    Raises RuntimeError: this vLLM is not one that was read; nothing is patched then.
    """
    runners, workers, held = (
        [each for each in map(_found, methods) if each is not None]
        for methods in (RUNNERS, WORKERS, HELD)
    )
    if not runners or not workers or len(held) < len(runners) or _import(_SIZES) is None:
        raise _another()
    for owner, name in runners:
        _wrap(owner, name, _initialize)
    for owner, name in workers:
        _wrap(owner, name, _available)
    seat = RunnerSeat(blocks)
    _SEATS[id(vllm_config)] = seat
    return seat


def _another() -> RuntimeError:
    return RuntimeError(
        f"this vLLM has another model runner than those that were read ({', '.join(READ_IN)})"
    )


def _found(method: Patched) -> tuple[Any, str] | None:
    """Its class; None where it is not loaded. Raises RuntimeError: it is not as it was read."""
    module, _, name = method.owner.rpartition(".")
    owner = getattr(sys.modules.get(module), name, None)
    if owner is None:
        return None
    function = vars(owner).get(method.name)
    takes = () if function is None else tuple(inspect.signature(function).parameters)
    if takes[: len(method.takes)] != method.takes:
        raise _another()
    return owner, method.name


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = _SEATS.get(id(self.vllm_config))
        if seat is None:
            return original(self, *args, **kwargs)
        return around(seat, original, self, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(owner, name, wrapped)


def _available(seat: RunnerSeat, original: Any, worker: Any) -> int:
    """Bytes for the cache, less those of the blocks that are set aside.

    What one request needs, and what the engine was told to have, comes first, so that no engine
    fails for want of it; and at least three quarters are the requests'.
    """
    available = int(original(worker))
    config, specs = worker.vllm_config, worker.get_kv_cache_spec().values()
    # With several groups of layers a block is smaller than all layers' pages.
    block = sum(spec.page_size_bytes for spec in specs)
    needed = (config.cache_config.num_gpu_blocks_override or 0) * block
    if getattr(config.model_config, "original_max_model_len", None) != -1:
        one = sum(spec.max_memory_usage_bytes(config) for spec in specs)
        needed = max(needed, one + block)
    room = max(0, min(available - needed, available // 4))
    seat.blocks = _least_of_ranks(min(seat.blocks, room // block), config.parallel_config)
    seat.has_room = True
    reserved = seat.blocks * block
    logger.info(
        "%d blocks (%.2f GiB) of the KV cache are set aside for looking ahead",
        seat.blocks,
        reserved / 2**30,
    )
    return available - reserved


def _least_of_ranks(number: int, parallel: Any) -> int:
    """All ranks look ahead in as many forwards."""
    if parallel.tensor_parallel_size == 1:
        return number
    import torch
    from vllm.distributed.parallel_state import get_tp_group

    least = torch.tensor(number)
    torch.distributed.all_reduce(
        least, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group
    )
    return int(least)


def _initialize(
    seat: RunnerSeat, original: Any, runner: Any, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """The cache with the blocks that are set aside behind those that the scheduler knows."""
    if kwargs.get("is_profiling") or (args and args[0]):
        return original(runner, config, *args, **kwargs)
    if not seat.has_room:
        # This worker sizes its cache in another way.
        seat.blocks = 0
    larger = _larger(runner.vllm_config, config, seat.blocks) if seat.blocks else config
    result = original(runner, larger, *args, **kwargs)
    seat.runner, seat.first = runner, config.num_blocks
    return result


def _larger(vllm_config: Any, config: Any, blocks: int) -> Any:
    """The same cache with so many blocks more, as vLLM itself lays it out."""
    if not config.kv_cache_tensors:
        return config
    free = copy.copy(vllm_config)
    free.cache_config = copy.copy(vllm_config.cache_config)
    free.cache_config.num_gpu_blocks_override = None
    block_bytes = config.kv_cache_tensors[0].size // config.num_blocks
    sized = _import(_SIZES)(
        free, config.kv_cache_groups, block_bytes * (config.num_blocks + blocks)
    )
    assert sized.num_blocks == config.num_blocks + blocks
    return dataclasses.replace(
        config, num_blocks=sized.num_blocks, kv_cache_tensors=sized.kv_cache_tensors
    )
