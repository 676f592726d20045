"""Linear layers through oneDNN: the same products, and only where they are wanted."""

import copy

import pytest
import torch
from torch import nn

from guided_decode import load_scorer
from guided_decode.forward import cpu_linear
from guided_decode.forward.cpu_linear import OneDnnLinear, use_onednn
from tests import models
from tests.checkpoints.quantised_models import needs

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


def frozen(inputs, outputs, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype)).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (48, 101), (123, 37), (1, 1)])
def test_products_are_those_of_float64(inputs, outputs, tokens, bias):
    model = frozen(inputs, outputs, bias)
    x = torch.randn(1, tokens, inputs)
    exact = copy.deepcopy(model).double()(x.double())
    error = (model(x) - exact).abs().max()
    use_onednn(model)
    assert type(model[0]) is OneDnnLinear
    with torch.no_grad():
        assert (model(x) - exact).abs().max() <= error + 1e-5


def test_what_it_is_not_for_is_left_alone():
    class Quantised(nn.Linear):
        pass

    trainable, low = nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
    other = Quantised(4, 4).requires_grad_(False)
    model = nn.ModuleList([trainable, low, other])
    use_onednn(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear, Quantised]


def test_gradients_are_torchs_own():
    model = frozen(8, 4)
    use_onednn(model)
    with torch.enable_grad():
        x = torch.randn(3, 8, requires_grad=True)
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(3, 8))


def test_a_torch_without_the_operation_keeps_its_own(monkeypatch):
    def gone(*arguments):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(cpu_linear, "_onednn", gone)
    cpu_linear._is_there.cache_clear()
    model = frozen(4, 4)
    use_onednn(model)
    assert type(model[0]) is nn.Linear
    cpu_linear._is_there.cache_clear()


def test_a_model_that_changes_its_dtype_afterwards_still_works():
    model = frozen(8, 8)
    use_onednn(model)
    model.to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))


def test_a_scorer_switches_its_own_copy_and_not_the_callers_model():
    mine = models.tiny("llama", "token")
    scorer = load_scorer(mine, kind="ppo-critic")
    linear = [m for m in scorer.model.model.modules() if isinstance(m, nn.Linear)]
    assert linear
    assert all(type(module) is OneDnnLinear for module in linear)
    assert not any(isinstance(module, OneDnnLinear) for module in mine.modules())
    assert linear[0].weight.data_ptr() in {p.data_ptr() for p in mine.parameters()}


@needs("torchao")
def test_quantised_weights_in_a_plain_linear_keep_their_own_products():
    """torchao leaves the class of the layer, and its weights say that they are float32."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = frozen(64, 32)
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.float32
    x = torch.randn(3, 64)
    own = model(x)
    use_onednn(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), own, rtol=0, atol=0)


@needs("torchao")
def test_a_layer_that_is_quantised_after_it_was_switched():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = frozen(64, 32)
    use_onednn(model)
    assert type(model[0]) is OneDnnLinear
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0")
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), x @ model[0].weight.dequantize().T, rtol=0, atol=1e-5)
