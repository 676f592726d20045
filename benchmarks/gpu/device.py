"""What the device is, and the two ceilings that floors are measured against."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.floors import Rates
from benchmarks.gpu.timing import timed

_PACKAGES = ("torch", "triton", "transformers", "numpy", "vllm", "flashinfer-python")
_COPIED = 4 << 30
_MATMUL = 8192
_WARM_SECONDS = 1.0


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def assumed_rates(gpu: str | None) -> tuple[float, float]:
    """What stands for rates that could not be measured: bytes and operations a second.

    A copy on an H200, and a bf16 product, were measured (4.3 TB/s, 790 TFLOP/s); an H100 has the
    same processor and 3.35 TB/s by its datasheet, of which a copy is assumed to reach as much.
    """
    return (4.3e12 if gpu is not None and "H200" in gpu else 3.0e12), 7.9e14


def machine() -> dict[str, Any]:
    """Facts that cost nothing to know; `gpu` is None where there is none."""
    facts: dict[str, Any] = {"versions": versions(), "cores": os.cpu_count(), "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip().splitlines()[0]


def measured_rates(copied: int = _COPIED, matmul: int = _MATMUL) -> Rates:
    """Bytes read and written in a second by a large copy; bf16 operations of a large product.

    The best of two ways to copy: torch's own, and a kernel that reads and writes. In a graph the
    first is left to the copy engine, which may be slower than the multiprocessors are.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(matmul, matmul, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    _until_clocks_are_up(lambda: torch.mm(a, b, out=product))
    multiply = timed([lambda: torch.mm(a, b, out=product)] * 4)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    copy = min(timed([way]).median for way in ways)
    return Rates(2 * source.nbytes / copy, 2 * matmul**3 / multiply.median)


def _until_clocks_are_up(work: Callable[[], object]) -> None:
    """Keeps the device busy: one that comes from idling runs slower at first."""
    if not torch.cuda.is_available():
        return
    end = time.monotonic() + _WARM_SECONDS
    while time.monotonic() < end:
        for _ in range(8):
            work()
        torch.cuda.synchronize()


def run() -> Iterator[dict[str, Any]]:
    """The part's records: one."""
    rates = measured_rates()
    yield {"kind": "rates", "bytes": rates.bytes, "flops": rates.flops}
