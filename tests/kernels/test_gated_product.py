"""gated_product: the reference against the activations of transformers, the kernel against it."""

import pytest
import torch
from transformers.activations import ACT2FN

from guided_decode.kernels.gated_product import (
    ACTIVATIONS,
    gated_product,
    gated_product_reference,
    gated_product_triton,
)
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

THEIRS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


def case(tokens, inner, **where):
    """Both halves of one product's output."""
    both = randn(tokens, 2 * inner, **where).mul_(4)
    return both[:, :inner], both[:, inner:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_what_a_feed_forward_does(activation, dtype):
    gate, up = case(5, 300, dtype=dtype)
    assert torch.equal(gated_product(gate, up, activation), ACT2FN[THEIRS[activation]](gate) * up)


def check(gate, up, activation, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch)
        output = gated_product_triton(gate, up, activation)
    reference = gated_product_reference(gate, up, activation)
    assert output.dtype == reference.dtype
    assert output.is_contiguous()
    truth = gated_product_reference(gate.double(), up.double(), activation)
    assert_as_close_as_torch(output, reference, truth)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (3, 1023), (2, 1025), (5, 1)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_is_the_reference(activation, shape, dtype, monkeypatch):
    check(*case(*shape, device=DEVICE, dtype=dtype), activation, monkeypatch)


@runs_kernels
def test_kernel_reads_any_strides_large_gates_and_an_empty_batch(monkeypatch):
    gate, up = case(4, 300, device=DEVICE)
    check(gate.t().contiguous().t(), up.contiguous(), "silu", monkeypatch)
    gate[0, :4] = torch.tensor([-200.0, 200.0, -0.0, -88.8])
    for activation in ACTIVATIONS:
        check(gate, up, activation, monkeypatch)
    assert gated_product_triton(gate[:0], up[:0], "silu").shape == (0, 300)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for activation in ACTIVATIONS:
        gated_product_triton(*case(16, 13824, dtype=torch.bfloat16), activation)
    for launch in made:
        assert_builds(launch, architecture)
