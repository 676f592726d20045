"""What the kernels part runs: each operation on real shapes, and what it stands beside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu import layer_cases
from benchmarks.gpu.attention_case import attention_case
from benchmarks.gpu.floors import LLAMA2_13B, LLAMA3_8B, Size
from benchmarks.gpu.timing import rotations
from guided_decode.kernels.candidate_shift import Shift
from guided_decode.kernels.guide_logits import guide_logits_reference, guide_logits_triton
from guided_decode.kernels.lm_head_value import (
    ValueWeights,
    lm_head_value_reference,
    lm_head_value_triton,
)
from guided_decode.kernels.norm import Norm
from guided_decode.kernels.norm_rows import norm_rows_reference, norm_rows_triton
from guided_decode.kernels.sample_tokens import sample_tokens_reference, sample_tokens_triton
from guided_decode.kernels.top_candidates import (
    Cut,
    top_candidates_reference,
    top_candidates_triton,
)
from guided_decode.kernels.value_head import value_head_reference, value_head_triton

Call = Callable[[], Any]


@dataclass(frozen=True)
class KernelCase:
    """One operation on one shape.

    ours: a call for each input set, which together exceed the cache. eager: the same by torch.
    truth: what the first of ours should give. others: named calls of other libraries' kernels.
    bytes: what one call has to move. target: a verdict is given on it.
    """

    kernel: str
    shape: str
    bytes: float
    ours: list[Call]
    eager: list[Call]
    truth: Call
    tolerance: float = 1e-2
    target: bool = False
    others: dict[str, Callable[[], list[Call]]] = field(default_factory=dict)


class Maker(NamedTuple):
    """Makes a case, which lives only while it is timed.

    closer: its launches are counted, and torch.compile is timed.
    """

    make: Callable[[], KernelCase]
    closer: bool = False


def makers(device: str, dtype: torch.dtype = torch.bfloat16) -> list[Maker]:
    """All cases, those with targets first."""
    sizes = (LLAMA3_8B, LLAMA2_13B)
    found = []
    for size in sizes:
        make = partial(attention_case, KernelCase, size, 16, 16, 4096, device, dtype, target=True)
        found.append(Maker(make, closer=True))
    for rows, size in product((16, 1, 64), sizes):
        closer = rows == 16 and size is LLAMA3_8B
        found += [
            Maker(partial(lm_head_case, size, rows, device, dtype), closer),
            Maker(partial(value_head_case, size, rows, device, dtype), closer),
            Maker(partial(norm_rows_case, size, rows, device, dtype), closer),
            *(
                Maker(partial(make, KernelCase, size, rows, device, dtype), closer)
                for make in layer_cases.CASES
            ),
            Maker(partial(top_candidates_case, size, rows, 16, device), closer),
            Maker(partial(guide_logits_case, size, rows, 16, device), closer),
            Maker(partial(sample_tokens_case, size, rows, device), closer),
        ]
    for batch, prefix, k, size in product((1, 64, 4, 16), (512, 4096), (16, 4, 32, 8), sizes):
        if (batch, prefix, k) != (16, 4096, 16):
            make = partial(attention_case, KernelCase, size, batch, k, prefix, device, dtype)
            found.append(Maker(make))
    return found


def value_head_case(size: Size, rows: int, device: str, dtype: torch.dtype) -> KernelCase:
    moved = rows * size.hidden * dtype.itemsize + size.hidden * (4 + dtype.itemsize) + 4 * rows
    sets = rotations(moved)
    hidden = torch.randn(sets, rows, size.hidden, device=device, dtype=dtype)
    weight = torch.randn(1, size.hidden, device=device) / size.hidden**0.5
    norm = Norm(torch.ones(size.hidden, device=device, dtype=dtype), 1e-5, 0.0)
    return KernelCase(
        "value_head",
        f"{rows} rows of {size.hidden}, with norm",
        moved,
        [lambda x=x: value_head_triton(x, weight, None, norm, None) for x in hidden],
        [lambda x=x: value_head_reference(x, weight, None, norm, None) for x in hidden],
        lambda: value_head_reference(hidden[0].float(), weight, None, norm, None),
        tolerance=1e-3,
    )


def norm_rows_case(size: Size, rows: int, device: str, dtype: torch.dtype) -> KernelCase:
    moved = (2 * rows + 1) * size.hidden * dtype.itemsize
    hidden = torch.randn(rotations(moved), rows, size.hidden, device=device, dtype=dtype)
    norm = Norm(torch.rand(size.hidden, device=device).to(dtype), 1e-5, 0.0)
    return KernelCase(
        "norm_rows",
        f"{rows} rows of {size.hidden}",
        moved,
        [lambda x=x: norm_rows_triton(x, norm, True) for x in hidden],
        [lambda x=x: norm_rows_reference(x, norm, True) for x in hidden],
        lambda: norm_rows_reference(hidden[0].double(), norm, False),
    )


def lm_head_case(size: Size, rows: int, device: str, dtype: torch.dtype) -> KernelCase:
    moved = (size.table_weights + rows * (size.hidden + size.vocab)) * dtype.itemsize
    sets = rotations(moved, most=4)
    head = nn.Linear(size.hidden, size.vocab, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(sets, rows, size.hidden, device=device, dtype=dtype)
    value = ValueWeights(torch.randn(1, size.hidden, device=device) / size.hidden**0.5, None)
    norm = Norm(torch.ones(size.hidden, device=device, dtype=dtype), 1e-5, 0.0)
    exact = head.weight.float()

    def truth() -> Tensor:
        x = hidden[0].float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)) @ exact.t()

    return KernelCase(
        "lm_head_value",
        f"{rows} rows, vocabulary {size.vocab}",
        moved,
        [lambda x=x: lm_head_value_triton(x, head, value, norm, None)[0] for x in hidden],
        [
            lambda x=x: lm_head_value_reference(x, head, value, norm, None, 1.0, None)[0]
            for x in hidden
        ],
        truth,
    )


def top_candidates_case(size: Size, rows: int, k: int, device: str) -> KernelCase:
    moved = rows * size.vocab * 4.125
    logits = torch.randn(rotations(moved, most=32), rows, size.vocab, device=device)
    cut = Cut(k, None, torch.full((rows,), 0.9, device=device), None, 1)
    return KernelCase(
        "top_candidates",
        f"{rows} rows, vocabulary {size.vocab}, k {k}, top-p 0.9",
        moved,
        [lambda x=x: top_candidates_triton(x, cut).candidates for x in logits],
        [lambda x=x: top_candidates_reference(x, cut).candidates for x in logits],
        lambda: top_candidates_reference(logits[0], cut).candidates,
        # The share of candidates that top-p may cut on either side of a rounding.
        tolerance=0.05,
        others={"torch.topk alone": lambda: [lambda x=x: x.topk(k) for x in logits]},
    )


def guide_logits_case(size: Size, rows: int, k: int, device: str) -> KernelCase:
    moved = rows * size.vocab * 4 + 25 * rows * k
    sets = rotations(moved, most=32)
    logits = torch.randn(sets, rows, size.vocab, device=device)
    shift, mask = _shift(rows, k, size.vocab, device), torch.zeros(rows, device=device).bool()
    return KernelCase(
        "guide_logits",
        f"{rows} rows, vocabulary {size.vocab}, k {k}, tail masked",
        moved,
        [lambda x=x: guide_logits_triton(x, shift, mask).logits for x in logits],
        [lambda x=x: guide_logits_reference(x, shift, mask).logits for x in logits],
        lambda: guide_logits_reference(logits[0], shift, mask).logits,
        tolerance=1e-5,
    )


def sample_tokens_case(size: Size, rows: int, device: str) -> KernelCase:
    sets = rotations(rows * size.vocab * 4, most=32)
    logits = torch.randn(sets, rows, size.vocab, device=device)
    heat = torch.full((rows,), 0.8, device=device)
    seeds, positions = torch.arange(rows, device=device), torch.arange(rows, device=device) + 100

    def unfused(x: Tensor) -> Tensor:
        # torch's own noise, which is no function of the request.
        shares = (x / heat[:, None]).softmax(-1)
        return (shares / torch.empty_like(shares).exponential_()).argmax(-1)

    return KernelCase(
        "sample_tokens",
        f"{rows} rows, vocabulary {size.vocab}",
        4.0 * rows * size.vocab,
        [lambda x=x: sample_tokens_triton(x, heat, seeds, positions) for x in logits],
        [lambda x=x: unfused(x) for x in logits],
        lambda: sample_tokens_reference(logits[0], heat, seeds, positions),
        # The share of rows whose two best keys may be a rounding apart.
        tolerance=0.1,
    )


def _shift(rows: int, k: int, vocab: int, device: str) -> Shift:
    """Every candidate scored, under reweight."""
    tokens = torch.stack([torch.randperm(vocab, device=device)[:k] for _ in range(rows)])
    per_row = torch.ones(rows, device=device)
    return Shift(
        tokens,
        torch.randn(rows, k, device=device),
        0.1 * per_row,
        per_row,
        torch.inf * per_row,
        torch.zeros_like(per_row).bool(),
        torch.ones(rows, k, device=device).bool(),
        None,
        1,
    )
