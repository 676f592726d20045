"""Norms in one launch: which modules are switched, and that they give what they gave."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig, LlamaModel, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from guided_decode.forward import fused_norms
from guided_decode.forward.final_norm import norm_of, take_final_norm
from guided_decode.forward.fused_norms import FusedNorm, form_of, fuse_norms
from tests.kernels.kernel_cases import on_cuda

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def norm(module_class, size=96, dtype=torch.bfloat16):
    module = module_class(size, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    module.weight.data.normal_(0.5, 0.3, generator=generator)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_form_of_a_module_is_found_by_what_it_gives(dtype):
    assert form_of(norm(LlamaRMSNorm, dtype=dtype)) == (1e-5, 0.0, True)
    assert form_of(norm(GemmaRMSNorm, dtype=dtype)) == (1e-5, 1.0, False)
    assert form_of(nn.LayerNorm(96)) is None


class Centred(LlamaRMSNorm):
    """It has the names of a root mean square norm, and another formula."""

    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


def test_another_formula_under_the_same_names_is_left_alone():
    assert norm_of(norm(Centred)) is None


def test_on_a_cpu_nothing_is_switched():
    model = LlamaModel(LlamaConfig(**SMALL))
    fuse_norms(model)
    assert not any(isinstance(module, FusedNorm) for module in model.modules())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Norms of a CPU are switched too, and their launches run the reference."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr(fused_norms, "_on_gpu", lambda hidden: True)
    calls = []
    plain = fused_norms.norm_rows

    def counted(*given, **options):
        calls.append(1)
        return plain(*given, **options)

    monkeypatch.setattr(fused_norms, "norm_rows", counted)
    return calls


@pytest.mark.parametrize("config", [
    LlamaConfig(**SMALL), Qwen3Config(**SMALL, head_dim=16), Gemma2Config(**SMALL, head_dim=16),
], ids=lambda config: config.model_type)  # fmt: skip
@torch.no_grad()
def test_a_model_gives_bit_for_bit_what_it_gave(config, as_on_a_gpu):
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(config).to(torch.bfloat16).eval()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight.normal_(0.5, 0.3)
    ids = torch.arange(12)[None]
    before = model(ids).last_hidden_state
    fuse_norms(model)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert norms
    assert all(isinstance(module, FusedNorm) for module in norms)
    assert torch.equal(model(ids).last_hidden_state, before)
    assert len(as_on_a_gpu) == len(norms)


@torch.no_grad()
def test_switched_norms_are_copied_trained_and_taken_as_before(as_on_a_gpu):
    model = LlamaModel(LlamaConfig(**SMALL)).eval()
    fuse_norms(model)
    copied = copy.deepcopy(model)
    copied.norm.weight.mul_(2)
    x = torch.randn(3, 64)
    torch.testing.assert_close(copied.norm(x), 2 * model.norm(x))
    assert isinstance(model.norm, LlamaRMSNorm)
    as_on_a_gpu.clear()
    with torch.enable_grad():
        x.requires_grad_()
        model.norm(x).sum().backward()
    assert not as_on_a_gpu, "a launch has no gradient"
    assert take_final_norm(copied).eps == copied.config.rms_norm_eps


@torch.no_grad()
def test_norms_of_one_class_and_size_keep_their_own_eps(as_on_a_gpu):
    model = nn.ModuleList([norm(LlamaRMSNorm), norm(LlamaRMSNorm)])
    model[1].variance_epsilon = 0.5
    hidden = torch.full((2, 96), 0.25, dtype=torch.bfloat16)
    expected = [module(hidden) for module in model]
    fuse_norms(model)
    assert all(torch.equal(m(hidden), e) for m, e in zip(model, expected, strict=True))


def test_what_replaces_a_forward_stays(as_on_a_gpu):
    model = LlamaModel(LlamaConfig(**SMALL)).eval()
    model.norm.forward = lambda hidden: hidden
    fuse_norms(model)
    assert not isinstance(model.norm, FusedNorm)
    assert isinstance(model.layers[0].input_layernorm, FusedNorm)


@on_cuda
@torch.no_grad()
def test_on_a_gpu_a_model_gives_what_it_gave_with_a_launch_a_norm():
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SMALL)).to("cuda", torch.bfloat16).eval()
    ids = torch.arange(12, device="cuda")[None]
    before = model(ids).last_hidden_state
    fuse_norms(model)
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=2e-2, atol=2e-2)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(ids)
        torch.cuda.synchronize()
    assert sum("norm_rows" in event.name for event in seen.events()) == 5
