"""What a decoder layer does between its products, merged, beside transformers' own operations."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.floors import Size
from benchmarks.gpu.timing import rotations
from guided_decode.kernels.add_norm import add_norm_reference, add_norm_triton
from guided_decode.kernels.gated_product import gated_product_reference, gated_product_triton
from guided_decode.kernels.norm import Norm
from guided_decode.kernels.rotary_slots import (
    Heads,
    Slots,
    Turn,
    rotary_slots_reference,
    rotary_slots_triton,
)
from guided_decode.kernels.rounded_norm import RoundedNorm

Case = Callable[[Callable[..., Any], Size, int, str, torch.dtype], Any]


def add_norm_case(
    made: Callable[..., Any], size: Size, rows: int, device: str, dtype: torch.dtype
) -> Any:
    """made, here and below: what makes the case of its fields."""
    moved = (4 * rows + 1) * size.hidden * dtype.itemsize
    pairs = torch.randn(rotations(moved), 2, rows, size.hidden, device=device, dtype=dtype)
    norm = RoundedNorm(
        Norm(torch.rand(size.hidden, device=device).to(dtype), 1e-5, 0.0), rounds_first=True
    )
    exact = norm._replace(rounds_first=False)
    return made(
        "add_norm",
        f"{rows} rows of {size.hidden}",
        moved,
        [lambda x=x, y=y: add_norm_triton(x, y, norm, None)[1] for x, y in pairs],
        [lambda x=x, y=y: add_norm_reference(x, y, norm, None)[1] for x, y in pairs],
        lambda: add_norm_reference(*pairs[0].double(), exact, None)[1],
    )


def rotary_slots_case(
    made: Callable[..., Any], size: Size, rows: int, device: str, dtype: torch.dtype
) -> Any:
    counts = (size.heads, size.kv_heads, size.kv_heads)
    widths = [count * size.head_dim for count in counts]
    moved = 2 * rows * sum(widths) * dtype.itemsize
    products = torch.randn(rotations(moved), rows, sum(widths), device=device, dtype=dtype)

    def heads(product: Tensor) -> Heads:
        parts = product.split(widths, -1)
        return Heads(*(part.unflatten(-1, (n, -1)) for part, n in zip(parts, counts, strict=True)))

    angles = torch.randn(rows, size.head_dim // 2, device=device).repeat(1, 2)
    turn = Turn(angles.cos().to(dtype), angles.sin().to(dtype))
    pool = torch.zeros(2, rows, size.kv_heads, size.head_dim, device=device, dtype=dtype)
    slots = Slots(*pool, torch.randperm(rows).to(device))
    inputs = [heads(product) for product in products]
    exact, wide = Turn(turn.cos.double(), turn.sin.double()), Slots(*pool.double(), slots.at)
    return made(
        "rotary_slots",
        f"{rows} tokens, {size.heads} and {size.kv_heads} heads of {size.head_dim}",
        moved,
        [lambda x=x: rotary_slots_triton(x, turn, slots) for x in inputs],
        [lambda x=x: rotary_slots_reference(x, turn, slots) for x in inputs],
        lambda: rotary_slots_reference(heads(products[0].double()), exact, wide),
    )


def gated_product_case(
    made: Callable[..., Any], size: Size, rows: int, device: str, dtype: torch.dtype
) -> Any:
    inner = size.intermediate
    moved = 3 * rows * inner * dtype.itemsize
    both = torch.randn(rotations(moved), rows, 2 * inner, device=device, dtype=dtype)
    return made(
        "gated_product",
        f"{rows} rows of {inner}",
        moved,
        [lambda x=x: gated_product_triton(*x.chunk(2, -1), "silu") for x in both],
        [lambda x=x: gated_product_reference(*x.chunk(2, -1), "silu") for x in both],
        lambda: gated_product_reference(*both[0].double().chunk(2, -1), "silu"),
    )


def joint_linear_case(
    made: Callable[..., Any], size: Size, rows: int, device: str, dtype: torch.dtype
) -> Any:
    """Queries, keys and values by one product, beside three."""
    widths = [size.heads * size.head_dim, *[size.kv_heads * size.head_dim] * 2]
    moved = (sum(widths) * (size.hidden + rows) + rows * size.hidden) * dtype.itemsize
    shape = (rotations(moved), sum(widths), size.hidden)
    weights = torch.randn(shape, device=device, dtype=dtype) / size.hidden**0.5
    hidden = torch.randn(rows, size.hidden, device=device, dtype=dtype)

    def apart(weight: Tensor) -> Tensor:
        # The last one, as wide as it is, stands for all three.
        return [F.linear(hidden, part) for part in weight.split(widths)][-1]

    return made(
        "joint_linear",
        f"{rows} rows of {size.hidden} to {' + '.join(map(str, widths))}",
        moved,
        [lambda w=w: F.linear(hidden, w)[:, -widths[-1] :] for w in weights],
        [lambda w=w: apart(w) for w in weights],
        lambda: F.linear(hidden.double(), weights[0].double())[:, -widths[-1] :],
    )


CASES: tuple[Case, ...] = (add_norm_case, rotary_slots_case, gated_product_case, joint_linear_case)
