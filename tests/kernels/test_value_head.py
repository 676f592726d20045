"""value_head: the reference against float64, the kernel against the reference."""

import pytest
import torch

from guided_decode.kernels.norm import Norm
from guided_decode.kernels.value_head import value_head, value_head_reference, value_head_triton
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    assert_as_close_as_torch,
    assert_builds,
    captured,
    on_cuda,
    poisoned,
    randn,
    recorded,
    runs_kernels,
)

# Tokens, hidden size and labels: blocks exactly filled, one short, one over, and tiny.
SHAPES = [
    (1, 2048, 1),
    (3, 2047, 1),
    (5, 2049, 2),
    (4, 64, 3),
    (2, 5120, 5),
    (3, 300, 17),
    (2, 1, 1),
]
VARIANTS = [(norm, bias, rows) for norm in (False, True) for bias in (False, True)
            for rows in (False, True)]  # fmt: skip


def case(tokens, size, labels, *, norm, bias, rows, device="cpu", dtype=torch.float32, seed=0):
    hidden = randn(tokens, size, seed=seed, dtype=dtype, device=device).mul_(3)
    weight = randn(labels, size, seed=seed + 1, device=device)
    given_bias = randn(labels, seed=seed + 2, device=device) if bias else None
    gain = randn(size, seed=seed + 3, dtype=dtype, device=device)
    given_rows = torch.tensor([tokens - 1, -1, 0, tokens // 2, -1], device=device)
    return (
        hidden,
        weight,
        given_bias,
        Norm(gain, 1e-2, 1.0) if norm else None,
        given_rows if rows else None,
    )


def in_float64(hidden, weight, bias, norm, rows):
    x = hidden.double()
    if norm is not None:
        scale = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        x = x / scale * (norm.offset + norm.weight.double())
    output = (x[:, None] * weight.double()).sum(-1) + (0 if bias is None else bias.double())
    if rows is None:
        return output
    return torch.stack([output[row] if row >= 0 else output[0] * torch.nan for row in rows])


@pytest.mark.parametrize(("norm", "bias", "rows"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_formula(norm, bias, rows, dtype):
    for shape in SHAPES:
        given = case(*shape, norm=norm, bias=bias, rows=rows, dtype=dtype)
        truth = in_float64(*given)
        output = value_head_reference(*given)
        assert output.dtype == torch.float32
        torch.testing.assert_close(
            output.double(), truth, rtol=1e-4, atol=1e-3, equal_nan=True, msg=str(shape)
        )


def test_sizes_of_different_models_are_refused():
    with pytest.raises(ValueError, match=r"size 8 .* 16"):
        value_head(torch.zeros(2, 8), torch.zeros(1, 16))


def check(given, monkeypatch):
    """Against float64, no worse than the reference, which torch computes in float32 as well."""
    truth, reference = in_float64(*given), value_head_reference(*given)
    with monkeypatch.context() as patch:
        poisoned(patch)
        output = value_head_triton(*given)
    read = ~truth.isnan()
    assert torch.equal(output.isnan(), ~read)
    assert output.dtype == torch.float32
    if read.any():
        assert_as_close_as_torch(output[read], reference[read], truth[read])


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("norm", "bias", "rows"), VARIANTS)
def test_kernel_is_the_reference(shape, norm, bias, rows, dtype, monkeypatch):
    given = case(*shape, norm=norm, bias=bias, rows=rows, device=DEVICE, dtype=dtype)
    check(given, monkeypatch)


@runs_kernels
def test_kernel_reads_strided_rows_and_an_empty_batch(monkeypatch):
    hidden, *others = case(4, 300, 2, norm=True, bias=True, rows=True, device=DEVICE)
    wide = torch.full((4, 512), torch.nan, device=DEVICE)
    wide[:, 100:400] = hidden
    check((wide[:, 100:400], *others), monkeypatch)
    check((hidden.t().contiguous().t(), *others), monkeypatch)
    assert value_head_triton(hidden[:0], *others[:3], None).shape == (0, 2)


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    hidden, weight, bias, norm, rows = case(
        9, 4096, 1, norm=True, bias=True, rows=True, device="cuda", dtype=torch.bfloat16
    )
    output = torch.zeros(len(rows), 1, device="cuda")

    def run():
        output.copy_(value_head(hidden, weight, bias, norm_weight=norm.weight, rows=rows))

    graph = captured(run)
    for seed in (4, 5):
        hidden.copy_(randn(9, 4096, seed=seed, device="cuda"))
        rows.copy_(rows.roll(1))
        graph.replay()
        wanted = value_head_reference(hidden, weight, bias, Norm(norm.weight, 1e-6, 0.0), rows)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-3, equal_nan=True)


def meta(labels, dtype, norm, bias, rows, size=4096):
    _, _, bias, norm, rows = case(2, 64, labels, norm=norm, bias=bias, rows=rows)
    gain = torch.empty(size, dtype=dtype, device="meta")
    value_head_triton(
        torch.empty(2, size, dtype=dtype, device="meta"),
        torch.empty(labels, size, device="meta"),
        None if bias is None else bias.to("meta"),
        None if norm is None else norm._replace(weight=gain),
        None if rows is None else rows.to("meta"),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    meta(1, torch.bfloat16, True, False, True)
    meta(1, torch.float32, False, True, False, size=5121)
    meta(16, torch.float16, True, True, True)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for labels in (1, 2, 4, 8, 16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for variant in VARIANTS:
                meta(labels, dtype, *variant)
    for launch in made:
        assert_builds(launch, architecture)
