# mypy: allow-untyped-defs, allow-incomplete-defs
"""The largest of many logits, in order, as integers that nothing ties: for kernels to call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guided_decode.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel()
def best_of(logits, place, stride, count, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The keys of the 2^LOG_K largest of 2^LOG_N logits, the largest first.

    A key is an int64 that orders by (logit, −place), so that nothing ties, and tells both; places
    from count on come after all others.
    """
    known = place < count
    logit = tl.load(logits + place * stride, mask=known, other=0.0).to(tl.float32)
    bits = logit.to(tl.int32, bitcast=True)
    # Sign and magnitude as one number: both zeros are 0.
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    keys = (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - place)
    keys = tl.where(known, keys, -0x7FFFFFFFFFFFFFFF)
    return _largest_keys(keys, LOG_N, LOG_K)


@kernel()
def places_of(keys):
    """The places that keys tell, int64; of what lies beyond the count one that is beyond any."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


@kernel()
def members_of(keys, LOG_GROUP: tl.constexpr):
    """The places of the members of the groups that keys tell, int64 [keys, 2^LOG_GROUP]."""
    inside = tl.arange(0, 1 << LOG_GROUP)
    return (places_of(keys)[:, None] << LOG_GROUP) + inside[None, :]


@kernel()
def _largest_keys(keys, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The 2^LOG_K largest of 2^LOG_N keys in order (bitonic top-k: Shanbhag et al., SIGMOD 2018).

    tl.topk does the same, but takes Triton's interpreter seconds. The keys form a hypercube whose
    axes are the bits of their places.
    """
    cube = tl.reshape(keys, [2] * LOG_N)
    # Runs of 2^LOG_K are sorted, by turns rising and falling. Of two that are neighbours, the
    # larger keys at each place are the larger half, and a bitonic run.
    for log_run in tl.static_range(1, LOG_K + 1):
        cube = _sorted_runs(cube, _bit(log_run, LOG_N), log_run, LOG_N)
    for log_n in tl.static_range(LOG_N - 1, LOG_K - 1, -1):
        cube = tl.max(cube, log_n - LOG_K)
        if log_n > LOG_K:
            cube = _sorted_runs(cube, _bit(LOG_K, log_n), LOG_K, log_n)
        else:
            cube = _sorted_runs(cube, 1, LOG_K, log_n)
    return tl.reshape(cube, [1 << LOG_K])


@kernel()
def _sorted_runs(cube, falling, LOG_RUN: tl.constexpr, LOG_N: tl.constexpr):
    """Sorts bitonic runs of 2^LOG_RUN keys, falling where that is 1 and rising where it is 0."""
    for bit in tl.static_range(LOG_RUN - 1, -1, -1):
        # A pair's sum less one is the other, also where the sum overflows.
        other = tl.sum(cube, LOG_N - 1 - bit, keep_dims=True) - cube
        larger = falling ^ _bit(bit, LOG_N)
        cube = tl.where((cube > other) == (larger != 0), cube, other)
    return cube


@kernel()
def _bit(bit: tl.constexpr, LOG_N: tl.constexpr):
    """A bit of the place in a hypercube of 2^LOG_N, in a shape that broadcasts over it."""
    shape: tl.constexpr = [1] * (LOG_N - 1 - bit) + [2] + [1] * bit
    return tl.reshape(tl.arange(0, 2), shape)
