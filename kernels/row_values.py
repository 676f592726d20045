# mypy: allow-untyped-defs, allow-incomplete-defs
"""A row's outputs of a value head, in one pass over its hidden state, for kernels to call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guided_decode.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

# Hidden · label products that a program holds at once.
_PRODUCTS = 2048


def hidden_block(label_block: int) -> int:
    """Hidden dimensions a step, where a program takes so many labels."""
    return _PRODUCTS // label_block


@kernel()
def write_row_values(
    hidden, weight, bias, norm_weight, rows, values, eps, offset, token_stride, labels, size,
    row, first_label, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """values[row] = norm(hidden[rows[row]]) · weightᵀ + bias of BLOCK_L labels; NaN for no token.

    The norm's factor is taken out of the sum, so that nothing is read twice; without norm_weight
    there is no norm, without rows a row is its token.
    """
    token = row.to(tl.int64)
    if rows is not None:
        token = tl.load(rows + row)
    label = first_label + tl.arange(0, BLOCK_L)
    output = tl.full([BLOCK_L], float("nan"), tl.float32)
    if token >= 0:
        x_of = hidden + token * token_stride
        dots = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
        squares = tl.zeros([BLOCK_H], tl.float32)
        w_of = weight + label[:, None].to(tl.int64) * size
        for start in range(0, size, BLOCK_H):
            at = start + tl.arange(0, BLOCK_H)
            inside = at < size
            x = tl.load(x_of + at, mask=inside, other=0.0).to(tl.float32)
            squares += x * x
            if norm_weight is not None:
                x *= offset + tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)
            read = (label < labels)[:, None] & inside[None, :]
            w = tl.load(w_of + at[None, :], mask=read, other=0.0).to(tl.float32)
            dots += x[None, :] * w
        output = tl.sum(dots, 1)
        if norm_weight is not None:
            output *= tl.rsqrt(tl.sum(squares) / size + eps)
        if bias is not None:
            output += tl.load(bias + label, mask=label < labels, other=0.0).to(tl.float32)
    tl.store(values + row.to(tl.int64) * labels + label, output, mask=label < labels)
