"""Triton kernels whose source stands beside their reference: Triton comes in at the first launch.

A machine without a GPU imports every operation, runs the references, and never loads Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]

# What the kernels take; another dtype goes to the reference.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Kernel:
    """A function in Triton's language that becomes a kernel, or a part of one, when it is used.

    Its module needs no `import triton.language as tl`: the name is put there then.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        do_not_specialize: Sequence[str],
        any_alignment: Sequence[str],
    ) -> None:
        self.function = function
        self.do_not_specialize = tuple(do_not_specialize)
        self.any_alignment = tuple(any_alignment)

    @cached_property
    def jitted(self) -> Any:
        """Triton's own object: a JITFunction, or an InterpretedFunction under TRITON_INTERPRET."""
        import triton

        scope = self.function.__globals__
        scope["tl"] = triton.language
        for name in self.function.__code__.co_names:
            if isinstance(scope.get(name), Kernel):
                scope[name] = scope[name].jitted
        return triton.jit(
            self.function,
            do_not_specialize=list(self.do_not_specialize),
            do_not_specialize_on_alignment=list(self.any_alignment),
        )

    def __call__(self, *arguments: Any) -> Any:
        """Within a kernel: a call of this function as a part of it."""
        return self.jitted(*arguments)

    def launch(self, grid: Grid, first: Tensor, *arguments: Any, **options: Any) -> None:
        """Runs the kernel on the device of its first argument; an empty grid runs nothing.

        Args:
            grid: how many programs along each axis.
            first: the first argument.
            arguments: the others.
            options: constants of the kernel, and Triton's num_warps and num_stages.
        """
        if 0 in grid:
            return
        with torch.cuda.device_of(first):
            self.jitted[grid](first, *arguments, **options)


def kernel(
    do_not_specialize: Sequence[str] = (), any_alignment: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Kernel]:
    """Makes a Kernel of a function.

    Args:
        do_not_specialize: integer arguments that vary from step to step, for which Triton shall
            not compile anew where they are 1 or divisible by 16.
        any_alignment: tensors for which it shall not where they begin at a multiple of 16 bytes.
    """
    return lambda function: Kernel(function, do_not_specialize, any_alignment)


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether Triton runs the operation: on CUDA, and for dtypes that the kernels take."""
    given = [tensor for tensor in tensors if tensor is not None]
    return given[0].is_cuda and all(tensor.dtype in FLOATS for tensor in given)


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
