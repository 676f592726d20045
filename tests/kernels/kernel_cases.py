"""How a kernel is checked: in Triton's interpreter, by compiling it, and on a GPU where one is.

The same tests hold a kernel to its reference on a GPU (marked gpu) and, in a process of its own
with TRITON_INTERPRET=1 that test_interpreter.py starts, on a CPU in float32.
"""

import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from guided_decode.kernels.jit import Kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's bf16 is wrong.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [32000, 32001, 128256, 151936]
ARCHITECTURES = [80, 90]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
NAN, INF = float("nan"), float("inf")

_has_gpu = torch.cuda.is_available()


def runs_kernels(test):
    """A test that runs Triton kernels on DEVICE."""
    skip = pytest.mark.skipif(
        not (INTERPRETED or _has_gpu), reason="needs a CUDA device, or TRITON_INTERPRET=1"
    )
    return pytest.mark.gpu(skip(test))


def on_cuda(test):
    """A test that needs a GPU itself."""
    skip = pytest.mark.skipif(INTERPRETED or not _has_gpu, reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    """The same normal numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its kin return with NaN, or −7 where there is none."""

    def filled(make: Any) -> Any:
        def empty(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(NAN if tensor.is_floating_point() else -7)

        return empty

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def assert_as_close_as_torch(
    output: torch.Tensor, torch_output: torch.Tensor, truth: torch.Tensor, extra: float = 1e-5
) -> None:
    """The oracle of low precision: no further from the truth than torch is at that dtype.

    Of two sums that round differently either may have the larger worst element, so it is the root
    mean square that must not be larger, and the worst not twice torch's.

    Args:
        output: what the kernel gave.
        torch_output: what torch's own operations gave at the same dtype.
        truth: float64.
        extra: relative to the largest |truth|, what is allowed beyond torch's error.
    """
    assert output.shape == truth.shape
    assert torch.isfinite(output).all()
    error, torchs = ((given.double() - truth).abs() for given in (output, torch_output))
    beyond = extra * float(truth.abs().max())
    assert _rms(error) <= 1.05 * _rms(torchs) + beyond
    assert float(error.max()) <= 2 * float(torchs.max()) + beyond


def _rms(error: torch.Tensor) -> float:
    return float(error.square().mean().sqrt())


def captured(run: Any) -> torch.cuda.CUDAGraph:
    """A CUDA graph of run(), which ran once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Launch(NamedTuple):
    """What a launcher gave a kernel."""

    kernel: Kernel
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Build(NamedTuple):
    """What the compiler made of a launch: bytes of shared memory and of local memory (spills)."""

    shared: int
    stack: int
    ptx: str


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that launchers make from now on, none of which runs."""
    launches: list[Launch] = []

    def record(self: Kernel, grid: Any, *arguments: Any, **options: Any) -> None:
        assert all(isinstance(n, int) and n >= 0 for n in grid)
        launches.append(Launch(self, arguments, options))

    monkeypatch.setattr(Kernel, "launch", record)
    return launches


def built(launch: Launch, architecture: int) -> Build:
    """Compiles a launch as Triton would, for a GPU that is not here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialised(launch)
    source = ASTSource(
        fn=launch.kernel.jitted, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Build(compiled.metadata.shared, _stack_bytes(compiled.asm["cubin"]), compiled.asm["ptx"])


def assert_builds(launch: Launch, architecture: int) -> None:
    """It compiles, spills nothing, and its shared memory is there."""
    build = built(launch, architecture)
    assert build.stack == 0, f"{launch.kernel.function.__name__} spills {build.stack} bytes"
    assert build.shared <= SHARED_LIMIT[architecture]


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
          torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}  # fmt: skip


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and divisibilities, as Triton's own launcher works them out."""
    names = list(inspect.signature(launch.kernel.function).parameters)
    given = dict(zip(names, launch.arguments, strict=False))
    given |= {name: launch.options[name] for name in names if name in launch.options}
    assert set(given) == set(names)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = given[name]
        fixed = name in launch.kernel.do_not_specialize
        constant = (
            value is None
            or name in launch.options
            or (type(value) is int and value == 1 and not fixed)
        )
        if constant:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not fixed and name not in launch.kernel.any_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory a thread of a compiled kernel uses: where registers spill to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (stack,), (local,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    return int(stack) + int(local)
