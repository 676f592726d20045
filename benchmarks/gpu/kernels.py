"""The kernels part: each checked against its reference, then timed beside other ways."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.budget import Deadline
from benchmarks.gpu.floors import Rates
from benchmarks.gpu.kernel_cases import KernelCase, Maker
from benchmarks.gpu.kernel_cases import makers as all_makers
from benchmarks.gpu.timing import launches, timed

Record = dict[str, Any]

_CASE_SECONDS, _COMPILE_SECONDS = 2.0, 15.0


class WrongKernelError(RuntimeError):
    """A kernel does not give what its reference gives."""


@torch.no_grad()
def run(rates: Rates, deadline: Deadline, device: str = "cuda") -> Iterator[Record]:
    """Launches of some; a record a case; torch.compile of some; what the time did not allow."""
    left = 0
    makers = list(all_makers(device))
    closer = [maker for maker in makers if maker.closer]
    # A target is among them, and a profile takes half a second.
    for maker in closer:
        if deadline.allows(_CASE_SECONDS):
            yield from _recorded(maker, count_launches)
    for maker in makers:
        if deadline.allows(_CASE_SECONDS):
            yield from _recorded(maker, lambda case: time_case(case, rates))
        else:
            left += 1
    if left:
        yield {"kind": "not run", "what": f"{left} shapes of kernels", "reason": "the time was up"}
    # Last, because the compiler may take long.
    for maker in closer:
        if deadline.allows(_COMPILE_SECONDS):
            yield from _recorded(maker, time_compiled)


def _recorded(maker: Maker, measure: Callable[[KernelCase], Record | None]) -> Iterator[Record]:
    """The record of a case, or of its failure."""
    what = "a kernel"
    try:
        case = maker.make()
        what = f"{case.kernel}, {case.shape}"
        record = measure(case)
        if record is not None:
            yield record
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        yield {"kind": "not run", "what": what, "reason": reason}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_case(case: KernelCase, rates: Rates) -> Record:
    """Checks a kernel against its reference, then times it.

    Raises WrongKernelError where they differ.
    """
    error = relative_error(case.ours[0](), case.truth())
    if not error <= case.tolerance:
        raise WrongKernelError(
            f"{case.kernel} ({case.shape}) differs from its reference by {error:.2g} of its norm, "
            f"where {case.tolerance:g} is allowed"
        )
    ours, eager = timed(case.ours), timed(case.eager)
    return {
        "kind": "kernel",
        "kernel": case.kernel,
        "shape": case.shape,
        "target": case.target,
        "error": error,
        "microseconds": 1e6 * ours.median,
        "least": 1e6 * ours.least,
        "most": 1e6 * ours.most,
        "bytes": case.bytes,
        "share_of_copy": case.bytes / ours.median / rates.bytes,
        "eager_microseconds": 1e6 * eager.median,
        "others": {name: _other(make) for name, make in case.others.items()},
    }


def count_launches(case: KernelCase) -> Record | None:
    """Kernels of one call, ours and torch's; None where the profiler saw none."""
    mine, theirs = launches(case.ours[0]), launches(case.eager[0])
    if mine is None or theirs is None:
        return None
    return {
        "kind": "launches",
        "kernel": case.kernel,
        "shape": case.shape,
        "ours": mine.kernels,
        "eager": theirs.kernels,
    }


def time_compiled(case: KernelCase) -> Record:
    """torch.compile's version of eager."""
    torch._dynamo.reset()
    calls = [torch.compile(call, dynamic=False) for call in case.eager[:4]]
    seconds = timed(calls).median
    return {
        "kind": "compiled",
        "kernel": case.kernel,
        "shape": case.shape,
        "microseconds": 1e6 * seconds,
    }


def relative_error(output: Tensor, truth: Tensor) -> float:
    """‖output − truth‖ / ‖truth‖ over what is finite; infinite where other places are.

    Of token ids: the share of rows that differ.
    """
    if not truth.is_floating_point():
        return float((output != truth).double().mean())
    finite = truth.isfinite()
    if output.shape != truth.shape or not torch.equal(output.isfinite(), finite):
        return float("inf")
    # Elsewhere both are the same infinity, or NaN.
    off = (output.double() - truth.double())[finite]
    return float(off.norm() / truth[finite].double().norm().clamp(min=1e-30))


def _other(make: Callable[[], list[Callable[[], object]]]) -> float | str:
    """Microseconds of another library's kernel, or why there are none."""
    try:
        return 1e6 * timed(make()).median
    except ImportError:
        return "not installed"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
