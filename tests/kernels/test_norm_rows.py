"""norm_rows: the reference against float64 and transformers' modules, the kernel against it."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from guided_decode.kernels.norm import Norm
from guided_decode.kernels.norm_rows import norm_rows, norm_rows_reference, norm_rows_triton
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

# Leading dimensions, and the size: a block exactly filled, one short, one over, and tiny.
SHAPES = [(1, 1024), (2, 3, 1023), (5, 1025), (1, 7, 4, 128), (3, 5120), (2, 1)]


def case(shape, *, offset=0.0, device="cpu", dtype=torch.float32, seed=0):
    hidden = randn(*shape, seed=seed, dtype=dtype, device=device).mul_(3)
    gain = randn(shape[-1], seed=seed + 1, dtype=dtype, device=device)
    return hidden, Norm(gain, 1e-2, offset)


def in_float64(hidden, norm):
    x = hidden.double()
    scale = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return x / scale * (norm.offset + norm.weight.double())


@pytest.mark.parametrize("rounds_first", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_reference_is_the_formula(offset, rounds_first):
    for shape in SHAPES:
        given = case(shape, offset=offset)
        output = norm_rows(*given, rounds_first=rounds_first)
        torch.testing.assert_close(output.double(), in_float64(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("module_class", "offset", "rounds_first"),
    [(LlamaRMSNorm, 0.0, True), (GemmaRMSNorm, 1.0, False)],
)
def test_reference_rounds_as_the_modules_do(module_class, offset, rounds_first, dtype):
    hidden, norm = case((4, 300), offset=offset, dtype=dtype)
    module = module_class(300, eps=norm.eps).to(dtype)
    with torch.no_grad():
        module.weight.copy_(norm.weight)
        assert torch.equal(norm_rows_reference(hidden, norm, rounds_first), module(hidden))


def check(given, rounds_first, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch)
        output = norm_rows_triton(*given, rounds_first)
    reference = norm_rows_reference(*given, rounds_first)
    assert output.dtype == reference.dtype
    assert_as_close_as_torch(output, reference, in_float64(*given))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("offset", "rounds_first"), [(0.0, True), (1.0, False)])
def test_kernel_is_the_reference(shape, offset, rounds_first, dtype, monkeypatch):
    given = case(shape, offset=offset, device=DEVICE, dtype=dtype)
    check(given, rounds_first, monkeypatch)


@runs_kernels
def test_kernel_reads_strided_rows_and_an_empty_batch(monkeypatch):
    hidden, norm = case((4, 300), device=DEVICE)
    wide = torch.full((4, 512), torch.nan, device=DEVICE)
    wide[:, 100:400] = hidden
    check((wide[:, 100:400], norm), True, monkeypatch)
    check((hidden.t().contiguous().t(), norm), True, monkeypatch)
    assert norm_rows_triton(hidden[:0], norm, True).shape == (0, 300)


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    hidden, norm = case((9, 4096), device="cuda", dtype=torch.bfloat16)
    output = torch.zeros_like(hidden)
    graph = captured(lambda: output.copy_(norm_rows(hidden, norm, rounds_first=True)))
    for seed in (4, 5):
        hidden.copy_(randn(9, 4096, seed=seed, device="cuda"))
        graph.replay()
        wanted = norm_rows_reference(hidden, norm, True)
        torch.testing.assert_close(output, wanted)


def meta(size, dtype, rounds_first, rows=16):
    hidden = torch.empty(1, rows, size, dtype=dtype, device="meta")
    weight = torch.empty(size, dtype=dtype, device="meta")
    norm_rows_triton(hidden, Norm(weight, 1e-5, 0.0), rounds_first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for size in (128, 4096, 5120, 8192, 16384):
        meta(size, torch.bfloat16, True)
    meta(3072, torch.float32, False)
    for launch in made:
        assert_builds(launch, architecture)
