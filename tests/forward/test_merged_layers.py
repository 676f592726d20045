"""Merged layers: which are switched, that they give what they gave, and what they launch."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from guided_decode import load_scorer
from guided_decode.forward import attention, layer_parts, merged_layers
from guided_decode.forward.merged_layers import Merged
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.self_check import check_packed
from guided_decode.prefix import PrefixHandle
from tests import models
from tests.forward.test_graphs import decode, scorer_like_a_gpus
from tests.kernels.kernel_cases import assert_as_close_as_torch

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50,
         "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1,
         "pad_token_id": 0, "bos_token_id": 2}  # fmt: skip
KNOWN = [
    LlamaConfig(**SMALL, attention_bias=True),
    MistralConfig(**SMALL, sliding_window=4),
    Qwen2Config(**SMALL),
    Qwen3Config(**SMALL, head_dim=16),
    GemmaConfig(**SMALL, head_dim=32),
    Gemma2Config(**SMALL, head_dim=16, attn_logit_softcapping=0.5),
    Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=4,
                     layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
]  # fmt: skip
OTHERS = [GraniteConfig(**SMALL, residual_multiplier=0.5), CohereConfig(**SMALL),
          Phi3Config(**SMALL), Olmo2Config(**SMALL)]  # fmt: skip


def kind(config):
    return config.model_type


@torch.no_grad()
def model_of(config, dtype=torch.float32, auto=AutoModel):
    torch.manual_seed(0)
    model = auto.from_config(config).to(dtype).eval()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight.normal_(0.5, 0.3)
    return model


def packed(model, **options):
    made = PackedModel(model, "the test's", **{"fused": True, "merged": True, "cache_tokens": 99}
                       | options)  # fmt: skip
    check_packed(made)
    return made


def merged_of(model):
    return [module for module in model.modules() if isinstance(module, Merged)]


def outputs(made, read=None):
    """Hidden states of a row's prefix and candidates, and of a second row that goes on from it."""
    rows = [([3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14]), ([3, 4, 5, 6, 7, 8, 30, 31], [7, 9])]
    made.cache.clear()
    made.cache.begin_batch()
    places = []
    for prefix, candidates in rows:
        row = made.row(PrefixHandle(prefix), 0, None, len(candidates))
        placed = made.place(row, torch.tensor(candidates).numpy(), alone=not places)
        places.append(placed)
    found = torch.cat([made.forward(batch, read) for batch in made.batches(places)])
    made.cache.end_batch()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", KNOWN, ids=kind)
def test_a_model_gives_what_it_gave(config, dtype):
    """As close to the truth as its own modules are at that dtype."""
    plain, ours = (packed(model_of(config, dtype), merged=merged) for merged in (False, True))
    assert not merged_of(plain.model)
    assert len(merged_of(ours.model)) == 3
    exact = PackedModel(model_of(config, dtype).double(), "exact", fused=True, cache_tokens=99)
    assert_as_close_as_torch(outputs(ours), outputs(plain), outputs(exact))


@pytest.mark.parametrize("config", OTHERS, ids=kind)
def test_what_is_made_otherwise_stays_as_it_is(config):
    made = packed(model_of(config))
    assert not merged_of(made.model)
    assert torch.equal(outputs(made), outputs(packed(model_of(config), merged=False)))


class Launches(TorchDispatchMode):
    """Counts torch's operations but views, and what our kernels launch in their place."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self._quiet = 0, False
        self._patch(monkeypatch, merged_layers, "add_norm", 1)
        self._patch(monkeypatch, merged_layers, "norm_rows", 1)
        self._patch(monkeypatch, merged_layers, "rotary_slots", 1)
        self._patch(monkeypatch, attention, "lookahead_attention", 2)
        self._patch(monkeypatch, layer_parts, "gated_product", 1)

    def _patch(self, monkeypatch, module, name, launches):
        plain = getattr(module, name)

        def counted(*given, **options):
            self.count += launches
            self._quiet = True
            try:
                return plain(*given, **options)
            finally:
                self._quiet = False

        monkeypatch.setattr(module, name, counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = ("_unsafe_view", "detach", "alias", "split")
        if not (self._quiet or function.is_view or any(each in function.name() for each in views)):
            self.count += 1
        return function(*args, **(kwargs or {}))


def launches(config, layers, monkeypatch, merged):
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * layers
    made = packed(model_of(config, torch.bfloat16), merged=merged)
    with monkeypatch.context() as patch, Launches(patch) as counter:
        outputs(made)
    return counter.count


@pytest.mark.parametrize("config", KNOWN, ids=kind)
def test_a_layer_is_at_most_ten_launches(config, monkeypatch):
    ours, plain = (
        launches(config, 4, monkeypatch, merged) - launches(config, 2, monkeypatch, merged)
        for merged in (True, False)
    )
    assert ours / 2 <= 10
    assert plain / 2 > 30


def test_heads_of_a_causal_lm_too():
    config = LlamaConfig(**SMALL)
    made, plain = (packed(model_of(config, auto=AutoModelForCausalLM), merged=merged)
                   for merged in (True, False))  # fmt: skip
    assert len(merged_of(made.model)) == 3
    read = torch.tensor([0, 4, 10])
    torch.testing.assert_close(outputs(made, read), outputs(plain, read), rtol=0, atol=1e-5)


def test_any_other_forward_is_the_modules_own():
    model = model_of(LlamaConfig(**SMALL))
    ids = torch.arange(12)[None]
    before = model(ids).last_hidden_state
    assert len(merged_of(packed(model).model)) == 3
    model.set_attn_implementation("sdpa")
    with torch.enable_grad():
        after = model(ids).last_hidden_state
        after.sum().backward()
    torch.testing.assert_close(after.detach(), before, rtol=0, atol=1e-5)
    assert model.layers[0].self_attn.q_proj.weight.grad is not None


def test_products_are_of_one_weight_that_the_modules_see():
    made = packed(model_of(LlamaConfig(**SMALL)))
    first = made.model.layers[0]
    parts = first.merged.parts
    outputs(made)
    joined = parts.projections._weight
    assert joined.shape == (64 + 32 + 32, 64)
    assert first.self_attn.k_proj.weight.data_ptr() == joined[64:].data_ptr()
    before = outputs(made)
    assert not made.changed()
    with torch.no_grad():
        first.self_attn.k_proj.weight.mul_(2)
        first.mlp.up_proj.weight.neg_()
    plain = packed(copy.deepcopy(made.model), merged=False)
    assert not torch.equal(outputs(made), before)
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


def test_a_copy_has_weights_of_its_own():
    made = packed(model_of(LlamaConfig(**SMALL)))
    before = outputs(made)
    copied = copy.deepcopy(made)
    with torch.no_grad():
        for layer in copied.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    assert torch.equal(outputs(made), before)
    assert not torch.equal(outputs(copied), before)
    weights = copied.model.layers[0].merged.parts.projections.modules
    assert weights[0] is copied.model.layers[0].self_attn.q_proj


def test_the_callers_weights_are_not_moved():
    caller = copy.deepcopy(models.tiny("llama", "token")).eval()
    places = [one.data_ptr() for one in caller.parameters()]
    plain = load_scorer(caller, kind="verl-critic").model
    assert plain.origin is not None
    made = PackedModel(plain.model, "the test's", fused=True, merged=True, cache_tokens=99)
    assert len(merged_of(made.model)) == len(caller.model.layers)
    found = outputs(made)
    assert [one.data_ptr() for one in caller.parameters()] == places
    unmerged = PackedModel(copy.deepcopy(caller.model), "its own", fused=True, cache_tokens=99)
    torch.testing.assert_close(found, outputs(unmerged), rtol=0, atol=1e-5)


def test_hooks_and_forwards_that_others_put_there_stay():
    model = model_of(LlamaConfig(**SMALL))
    seen = []
    model.layers[1].mlp.register_forward_hook(lambda *given: seen.append(1))
    own = model.layers[2].forward
    model.layers[2].forward = lambda *given, **options: own(*given, **options)
    made = packed(model)
    assert [isinstance(layer, Merged) for layer in model.layers] == [True, False, False]
    seen.clear()
    wanted = outputs(packed(model_of(LlamaConfig(**SMALL)), merged=False))
    torch.testing.assert_close(outputs(made), wanted, rtol=0, atol=1e-5)
    assert seen


def test_a_hidden_state_that_someone_changed_between_layers_is_normed_again():
    made, plain = (packed(model_of(LlamaConfig(**SMALL)), merged=merged)
                   for merged in (True, False))  # fmt: skip
    for each in (made, plain):
        each.model.layers[1].register_forward_pre_hook(lambda _, given: (given[0] * 1.5,))
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


def test_experts_run_as_they_are():
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    made, plain = (packed(model_of(config), merged=merged) for merged in (True, False))
    assert len(merged_of(made.model)) == 3
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


class Halved(nn.Module):
    """An activation under a known name's place, of another formula."""

    def forward(self, x):
        return torch.sigmoid(x)


def test_an_activation_that_is_not_known_runs_as_it_is():
    model = model_of(LlamaConfig(**SMALL))
    for layer in model.layers:
        layer.mlp.act_fn = Halved()
    plain = packed(copy.deepcopy(model), merged=False)
    made = packed(model)
    assert len(merged_of(model)) == 3
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "gemma2"])
def test_a_guided_decode_with_padded_batches_is_the_same(arch):
    merged, plain = (scorer_like_a_gpus(arch, merged=each) for each in (True, False))
    assert merged_of(merged.model.model)
    for mine, theirs in zip(decode(merged), decode(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert merged._graphs.replays > 5


class Tripled(nn.Module):
    """A feed-forward over the same projections, of another formula."""

    def __init__(self, own):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
        self.act_fn = own.act_fn

    def forward(self, x):
        return 3 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def replaced_feed_forwards(model):
    for layer in model.layers:
        layer.mlp = Tripled(layer.mlp)


def norms_that_are_not_finite(model):
    found = {name: torch.full_like(each, torch.nan) for name, each in model.state_dict().items()
             if "layernorm" in name}  # fmt: skip
    model.load_state_dict(found, strict=False, assign=True)


@pytest.mark.parametrize("change", [replaced_feed_forwards, norms_that_are_not_finite])
def test_a_layer_that_fails_its_trial_after_a_change_is_the_modules_own(change):
    made, plain = (packed(model_of(LlamaConfig(**SMALL)), merged=merged)
                   for merged in (True, False))  # fmt: skip
    before = outputs(made)
    for each in (made, plain):
        change(each.model)
        each.begin_call()
    assert not merged_of(made.model)
    assert not torch.equal(outputs(made), before)
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5, equal_nan=True)


def test_layers_whose_trial_runs_out_of_memory_are_the_modules_own(monkeypatch):
    made, plain = (packed(model_of(LlamaConfig(**SMALL)), merged=merged)
                   for merged in (True, False))  # fmt: skip
    assert merged_of(made.model)

    def no_room(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for each in (made, plain):
        fresh = {name: value * 2 for name, value in each.model.state_dict().items()}
        each.model.load_state_dict(fresh, assign=True)
    with monkeypatch.context() as patch:
        patch.setattr(merged_layers, "rotary_slots", no_room)
        made.begin_call()
    assert not merged_of(made.model)
    plain.begin_call()
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)
