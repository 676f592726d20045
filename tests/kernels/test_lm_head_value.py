"""lm_head_value: the reference against float64, the kernel against it, and who falls back."""

import sys

import pytest
import torch
from torch import nn

from guided_decode.kernels.lm_head_value import (
    TILES,
    Tile,
    ValueWeights,
    fuses,
    lm_head_value,
    lm_head_value_reference,
    lm_head_value_triton,
)
from guided_decode.kernels.norm import Norm
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    INTERPRETED,
    VOCABULARIES,
    assert_as_close_as_torch,
    assert_builds,
    captured,
    on_cuda,
    poisoned,
    randn,
    recorded,
    runs_kernels,
)

# The package's name for the module is the function.
module = sys.modules[lm_head_value.__module__]

# Tokens, hidden size, vocabulary and labels.
SHAPES = [(1, 128, 256, 1), (17, 300, 507, 3), (16, 257, 129, 1), (5, 32, 63, 16), (33, 96, 128, 2)]
VARIANTS = [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]


def case(
    tokens, size, vocab, labels, *, norm, bias, rows, device="cpu", dtype=torch.float32, seed=0
):
    hidden = randn(tokens, size, seed=seed, dtype=dtype, device=device).mul_(3)
    lm_head = nn.Linear(size, vocab, bias=bias, device=device, dtype=dtype)
    for number, parameter in enumerate(lm_head.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=seed + 1 + number, device=device))
    value = ValueWeights(
        randn(labels, size, seed=seed + 3, device=device),
        randn(labels, seed=seed + 4, device=device) if bias else None,
    )
    gain = randn(size, seed=seed + 5, dtype=dtype, device=device)
    given_rows = torch.tensor([tokens - 1, -1, 0, tokens // 2, -1], device=device)
    return (
        hidden,
        lm_head,
        value,
        Norm(gain, 1e-2, 1.0) if norm else None,
        given_rows if rows else None,
    )


def plainly(hidden, lm_head, value, norm, rows, dtype):
    """As transformers' modules and a head after them do it in some dtype; rows are all read."""
    x = hidden.to(dtype)
    if norm is not None:
        exact = x.to(torch.promote_types(dtype, torch.float32))
        scale = (exact.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        x = (norm.offset + norm.weight.to(dtype)) * (exact * scale).to(dtype)
    bias = None if lm_head.bias is None else lm_head.bias.to(dtype)
    logits = nn.functional.linear(x, lm_head.weight.to(dtype), bias)
    bias = None if value.bias is None else value.bias.to(dtype)
    values = nn.functional.linear(x, value.weight.to(dtype), bias)
    index = slice(None) if rows is None else rows.clamp(min=0)
    return logits[index], values[index]


def check(result, given, **fields):
    hidden, rows = given[0], given[-1]
    logits, values = result
    assert logits.dtype == hidden.dtype
    assert values.dtype == torch.float32
    read = slice(None) if rows is None else rows >= 0
    if rows is not None:
        assert (logits[~read] == -torch.inf).all()
        assert values[~read].isnan().all()
    truths, torchs = plainly(*given, torch.float64), plainly(*given, hidden.dtype)
    for output, eager, truth in zip(result, torchs, truths, strict=True):
        assert_as_close_as_torch(output[read], eager[read], truth[read], **fields)


@pytest.mark.parametrize(("norm", "bias", "rows"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_formula(norm, bias, rows, dtype):
    for shape in SHAPES:
        given = case(*shape, norm=norm, bias=bias, rows=rows, dtype=dtype)
        check(lm_head_value_reference(*given, 1.0, None), given)


def test_reference_scales_and_caps_as_cohere_and_gemma_do():
    given = case(3, 16, 40, 1, norm=True, bias=False, rows=False)
    plain, _ = plainly(*given, torch.float32)
    scaled, _ = lm_head_value_reference(*given, 0.0625, None)
    torch.testing.assert_close(scaled, plain * 0.0625)
    capped, _ = lm_head_value_reference(*given, 1.0, 30.0)
    torch.testing.assert_close(capped, torch.tanh(plain / 30.0) * 30.0)


class QuantisedLinear(nn.Linear):
    pass


class QuantisedWeight(torch.Tensor):
    pass


def test_a_plain_linear_head_is_fused_and_no_other():
    head = nn.Linear(8, 16)
    assert fuses(head, torch.float32, 1.0, None)
    assert not fuses(head, torch.bfloat16, 1.0, None)
    assert not fuses(head, torch.float32, 0.5, None)
    assert not fuses(head, torch.float32, 1.0, 30.0)
    assert not fuses(QuantisedLinear(8, 16), torch.float32, 1.0, None)
    assert not fuses(nn.Sequential(head), torch.float32, 1.0, None)
    hooked = nn.Linear(8, 16)
    hooked.register_forward_hook(lambda *_: None)
    assert not fuses(hooked, torch.float32, 1.0, None)
    wrapped = nn.Linear(8, 16)
    wrapped.forward = lambda x: x
    assert not fuses(wrapped, torch.float32, 1.0, None)
    subclass = nn.Linear(8, 16)
    subclass.weight = nn.Parameter(subclass.weight.data.as_subclass(QuantisedWeight))
    assert not fuses(subclass, torch.float32, 1.0, None)


def test_a_head_that_is_not_fused_runs_as_it_is():
    hidden, head, value, norm, rows = case(4, 16, 40, 2, norm=True, bias=True, rows=True)
    clamped = nn.Sequential(head, nn.Hardtanh(-1, 1))
    logits, values = lm_head_value(
        hidden,
        clamped,
        *value,
        norm_weight=norm.weight,
        norm_eps=norm.eps,
        norm_offset=1.0,
        rows=rows,
    )
    wanted = plainly(hidden, head, value, norm, rows, torch.float32)
    live = rows >= 0
    torch.testing.assert_close(logits[live], wanted[0][live].clamp(-1, 1))
    torch.testing.assert_close(values[live], wanted[1][live])


def test_sizes_of_different_models_are_refused():
    with pytest.raises(ValueError, match=r"size 8 .* 16"):
        lm_head_value(torch.zeros(2, 8), nn.Linear(8, 4), torch.zeros(1, 16))


def triton(given, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch)
        return lm_head_value_triton(*given)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("norm", "bias", "rows"), VARIANTS)
def test_kernel_is_the_reference(shape, norm, bias, rows, dtype, monkeypatch):
    given = case(*shape, norm=norm, bias=bias, rows=rows, device=DEVICE, dtype=dtype)
    check(triton(given, monkeypatch), given)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_kernel_writes_every_vocabulary(vocab, dtype, monkeypatch):
    if INTERPRETED:
        # There a program takes as long however large its tile is.
        monkeypatch.setitem(TILES, True, (Tile(16, 2048, 32, warps=4, stages=1),))
    given = case(2, 24, vocab, 1, norm=True, bias=False, rows=False, device=DEVICE, dtype=dtype)
    check(triton(given, monkeypatch), given)


@runs_kernels
@pytest.mark.parametrize("tile", [tile for tiles in TILES.values() for tile in tiles], ids=str)
def test_kernel_holds_for_every_tile(tile, monkeypatch):
    # In float32, which the tiles of 16 bits would never see.
    monkeypatch.setitem(TILES, True, (tile,))
    for shape in ((65, 129, 131, 1), (64, 64, 257, 2)):
        given = case(*shape, norm=True, bias=True, rows=False, device=DEVICE)
        check(triton(given, monkeypatch), given)


@runs_kernels
def test_kernel_reads_strided_rows_and_an_empty_batch(monkeypatch):
    hidden, *others = case(4, 300, 70, 2, norm=True, bias=True, rows=True, device=DEVICE)
    given = (hidden.t().contiguous().t(), *others)
    check(triton(given, monkeypatch), given)
    logits, values = lm_head_value_triton(hidden[:0], *others[:-1], None)
    assert (logits.shape, values.shape) == ((0, 70), (0, 2))


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    given = case(9, 1024, 5003, 1, norm=True, bias=False, rows=True, device="cuda",
                 dtype=torch.bfloat16)  # fmt: skip
    hidden, lm_head, value, norm, rows = given
    logits = torch.zeros(len(rows), 5003, device="cuda", dtype=torch.bfloat16)
    values = torch.zeros(len(rows), 1, device="cuda")

    def run():
        result = lm_head_value(
            hidden, lm_head, *value, norm_weight=norm.weight, norm_eps=norm.eps,
            norm_offset=norm.offset, rows=rows,
        )  # fmt: skip
        logits.copy_(result[0])
        values.copy_(result[1])

    graph = captured(run)
    for seed in (7, 8):
        hidden.copy_(randn(9, 1024, seed=seed, device="cuda"))
        rows.copy_(rows.roll(1))
        graph.replay()
        check((logits, values), given)


def meta(rows, labels, dtype, norm, bias, read, size=4096, vocab=32000):
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    lm_head = nn.Linear(size, vocab, bias=bias, dtype=dtype, device="meta")
    value = ValueWeights(
        empty(labels, size, dtype=torch.float32),
        empty(labels, dtype=torch.float32) if bias else None,
    )
    lm_head_value_triton(
        empty(rows, size),
        lm_head,
        value,
        Norm(empty(size), 1e-5, 0.0) if norm else None,
        empty(rows, dtype=torch.int64) if read else None,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    meta(1, 1, torch.bfloat16, True, False, True)
    meta(64, 1, torch.bfloat16, True, False, True, vocab=151936)
    meta(4, 16, torch.float32, True, True, False, size=4097, vocab=32001)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("labels", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(monkeypatch, architecture, labels):
    made = recorded(monkeypatch)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 64):
            for variant in VARIANTS:
                meta(rows, labels, dtype, *variant)
    for launch in made:
        assert_builds(launch, architecture)
