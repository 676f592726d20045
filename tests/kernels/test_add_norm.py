"""add_norm: the reference against the modules of transformers, the kernel against it."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from guided_decode.kernels.add_norm import add_norm, add_norm_reference, add_norm_triton
from guided_decode.kernels.norm import Norm
from guided_decode.kernels.rounded_norm import RoundedNorm
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    assert_as_close_as_torch,
    assert_builds,
    poisoned,
    randn,
    recorded,
    runs_kernels,
)

# Leading dimensions, and the size: a block exactly filled, one short, one over, and tiny.
SHAPES = [(1, 1024), (2, 3, 1023), (5, 1025), (2, 1)]
LLAMAS, GEMMAS = (0.0, True), (1.0, False)


def norm_of(size, form, seed, **where):
    offset, rounds_first = form
    return RoundedNorm(Norm(randn(size, seed=seed, **where), 1e-2, offset), rounds_first)


def case(shape, form, *, inner=False, **where):
    residual, update = randn(*shape, **where).mul_(3), randn(*shape, seed=1, **where)
    norm, own = (norm_of(shape[-1], form, seed, **where) for seed in (2, 3))
    return residual, update, norm, own if inner else None


def in_float64(residual, update, norm, update_norm):
    def normed(x, by):
        weight, eps, offset = by.norm
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())

    update = update.double()
    if update_norm is not None:
        update = normed(update, update_norm)
    total = residual.double() + update
    return total, normed(total, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("module_class", "form"), [(LlamaRMSNorm, LLAMAS), (GemmaRMSNorm, GEMMAS)])
@torch.no_grad()
def test_reference_is_what_a_layer_does(module_class, form, inner, dtype):
    residual, update, norm, own = case((4, 300), form, inner=inner, dtype=dtype)

    def module(by):
        made = module_class(300, eps=by.norm.eps).to(dtype)
        made.weight.copy_(by.norm.weight)
        return made

    wanted = residual + (update if own is None else module(own)(update))
    total, output = add_norm(residual, update, norm, own)
    assert torch.equal(total, wanted)
    assert torch.equal(output, module(norm)(wanted))


def check(given, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch)
        outputs = add_norm_triton(*given)
    for ours, torchs, truth in zip(
        outputs, add_norm_reference(*given), in_float64(*given), strict=True
    ):
        assert ours.dtype == torchs.dtype
        assert_as_close_as_torch(ours, torchs, truth)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [LLAMAS, GEMMAS])
@pytest.mark.parametrize("inner", [False, True])
def test_kernel_is_the_reference(shape, form, inner, dtype, monkeypatch):
    check(case(shape, form, inner=inner, device=DEVICE, dtype=dtype), monkeypatch)


@runs_kernels
def test_kernel_reads_strided_rows_and_an_empty_batch(monkeypatch):
    residual, update, norm, own = case((4, 300), LLAMAS, inner=True, device=DEVICE)
    wide = torch.full((4, 512), torch.nan, device=DEVICE)
    wide[:, 100:400] = update
    check((residual.t().contiguous().t(), wide[:, 100:400], norm, own), monkeypatch)
    total, output = add_norm_triton(residual[:0], update[:0], norm, None)
    assert total.shape == output.shape == (0, 300)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for size in (4096, 5120, 8192, 16384):
        for inner in (False, True):
            given = case((16, size), LLAMAS, inner=inner, dtype=torch.bfloat16)
            add_norm_triton(*given)
    for launch in made:
        assert_builds(launch, architecture)
