# mypy: allow-untyped-defs, allow-incomplete-defs
"""A root mean square norm as a module of transformers gives it, roundings included."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from guided_decode.kernels.jit import kernel
from guided_decode.kernels.norm import Norm
from guided_decode.kernels.norm_rows import norm_rows_reference

if TYPE_CHECKING:
    import triton.language as tl


class RoundedNorm(NamedTuple):
    """rounds_first: before the product with (offset + weight) as well, as of `norm_rows`."""

    norm: Norm
    rounds_first: bool

    def reference(self, hidden: Tensor) -> Tensor:
        """Of the last dimension; hidden's shape and dtype."""
        return norm_rows_reference(hidden, self.norm, self.rounds_first)


@kernel()
def normed(x, gain, size, eps, ROUNDS_FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """A row in float32, zero beyond its size, normed and rounded to DTYPE; float32 again.

    gain: offset + weight, float32.
    """
    x *= tl.rsqrt(tl.sum(x * x) / size + eps)
    if ROUNDS_FIRST:
        x = x.to(DTYPE).to(tl.float32)
    return (x * gain).to(DTYPE).to(tl.float32)
