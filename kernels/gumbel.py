# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gumbel noise that is a function of (seed, position, token id): Philox 4x32-10, counter-based.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The key is the seed, the
counter is (token id, position's low word, position's high word, 0). The first two words of the
block make u, the third and fourth are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_decode.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# The largest float32 under 1.
_LARGEST = 1.0 - 2.0**-24


def gumbel_noise(
    seeds: Tensor,  # [...] int64
    positions: Tensor,  # [...] int64
    tokens: Tensor,  # [...] int64
) -> Tensor:
    """Standard Gumbel noise of each (seed, position, token id), −log(−log1p(−u)).

    u lies in (0, 1) and has 24 significant bits down to 2⁻⁴⁰, so that the largest of a whole
    vocabulary's draws is as finely spaced as the others. Sampling k candidates with it is
    sampling the vocabulary with −inf at the others.

    Args:
        seeds, positions, tokens: int64, broadcast together; tokens are at least 0.

    Returns:
        float32, of the broadcast shape.
    """
    counter = (
        tokens & _WORD,
        positions & _WORD,
        (positions >> 32) & _WORD,
        torch.zeros_like(seeds),
    )
    high, low, _, _ = philox(counter, (seeds & _WORD, (seeds >> 32) & _WORD))
    u = high.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64
    return -exponential(u.clamp(max=_LARGEST)).log()


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 of 32-bit words that int64 tensors hold: four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 × 32-bit product; halves of a, because int64 holds no 2⁶⁴."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, (a * b) & _WORD


def exponential(u: Tensor) -> Tensor:
    """−log1p(−u), to rounding, by a logarithm that both torch and Triton have.

    log1p(−u) = log(w) · u / (1 − w) with w the rounded 1 − u (Goldberg 1991, theorem 4).
    """
    w = 1.0 - u
    rounded = 1.0 - w
    return torch.where(rounded == 0, u, -w.log() * (u / rounded.masked_fill(rounded == 0, 1.0)))


@kernel()
def gumbel(seed, position, token):
    """`gumbel_noise` of one row: seed and position are int64 scalars, token is int64 [n]."""
    zero = tl.zeros_like(token).to(tl.uint32)
    low_position = (position & 0xFFFFFFFF).to(tl.uint32) + zero
    high_position = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    high, low, _, _ = tl.philox(seed, token.to(tl.uint32), low_position, high_position, zero)
    fine = (low.to(tl.float32) + 0.5) * 5.421010862427522e-20
    u = high.to(tl.float32) * 2.3283064365386963e-10 + fine
    u = tl.minimum(u, 0.999999940395355224609375)
    w = 1.0 - u
    rounded = 1.0 - w
    ratio = tl.div_rn(u, tl.where(rounded == 0.0, 1.0, rounded))
    return -tl.log(tl.where(rounded == 0.0, u, -tl.log(w) * ratio))
