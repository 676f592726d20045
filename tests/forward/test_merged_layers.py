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
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from guided_decode import load_scorer
from guided_decode.forward import attention, layer_parts, merged_layers, packed_model
from guided_decode.forward.merged_layers import Merged
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.self_check import check_packed
from guided_decode.forward.weights import Origin, comes_from
from guided_decode.integrations.transformers import join_weights
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


def far_outputs(made, length):
    """Hidden states of the candidates of a row of this many tokens."""
    ids = torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    made.cache.clear()
    made.cache.begin_batch()
    row = made.row(PrefixHandle(ids), 0, None, 3)
    placed = made.place(row, torch.tensor([12, 13, 14]).numpy(), alone=True)
    (found,) = [made.forward(batch) for batch in made.batches([placed])]
    made.cache.end_batch()
    return found[-3:]


class FarSighted(LlamaAttention):
    """Scales by the position, which it takes without a name of its own."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None,
                past_key_values=None, **kwargs):  # fmt: skip
        factor = 1 + 0.5 * torch.log1p(kwargs["position_ids"][..., None] // 16)
        return super().forward(hidden_states * factor, position_embeddings, attention_mask,
                               past_key_values, **kwargs)  # fmt: skip


def far_sighted():
    model = model_of(LlamaConfig(**SMALL))
    for layer in model.layers:
        layer.self_attn.__class__ = FarSighted
    return model


def ministral():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 16}  # fmt: skip
    return model_of(Ministral3Config(**SMALL, head_dim=16, max_position_embeddings=256,
                                     rope_parameters=rope))  # fmt: skip


@pytest.mark.parametrize("make", [ministral, far_sighted])
def test_a_layer_that_scales_by_its_position_is_the_modules_own(make):
    made, plain = (packed(make(), merged=merged) for merged in (True, False))
    assert not merged_of(made.model)
    torch.testing.assert_close(far_outputs(made, 70), far_outputs(plain, 70), rtol=0, atol=1e-5)


def rope(kind, **more):
    """A Llama whose turns depend on the longest sequence that it saw."""
    turns = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}
    return LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=turns)


TURNS = [rope("dynamic", original_max_position_embeddings=16),
         rope("longrope", original_max_position_embeddings=16, short_factor=[1.0] * 8,
              long_factor=[3.0] * 8)]  # fmt: skip


@pytest.mark.parametrize("config", TURNS, ids=lambda c: c.rope_parameters["rope_type"])
def test_trials_far_out_leave_no_trace_in_turns(config):
    made, plain = (packed(model_of(config), merged=merged) for merged in (True, False))
    assert len(merged_of(made.model)) == 3
    for length in (9, 40, 9):
        ours, theirs = far_outputs(made, length), far_outputs(plain, length)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", KNOWN, ids=kind)
def test_far_positions_give_what_they_gave(config):
    made, plain = (packed(model_of(config), merged=merged) for merged in (True, False))
    assert len(merged_of(made.model)) == 3
    torch.testing.assert_close(far_outputs(made, 90), far_outputs(plain, 90), rtol=0, atol=2e-5)


@pytest.mark.parametrize("large", [1.0, 300.0, 3000.0])
def test_a_large_activation_hides_no_difference(large):
    """As trained models have it in one channel of their first token."""
    model = model_of(GraniteConfig(**SMALL, residual_multiplier=0.22, embedding_multiplier=12.0,
                                   attention_multiplier=0.0156), torch.bfloat16)  # fmt: skip
    with torch.no_grad():
        model.embed_tokens.weight[:, 5] = large / 12
    assert not merged_of(packed(model).model)


@pytest.mark.parametrize("config", KNOWN, ids=kind)
def test_a_large_activation_keeps_no_layer_apart(config):
    model = model_of(config, torch.bfloat16)
    with torch.no_grad():
        model.embed_tokens.weight[:, 5] = 300
    assert len(merged_of(packed(model).model)) == 3


def test_a_number_that_is_no_parts_keeps_a_layer_apart():
    model = model_of(LlamaConfig(**SMALL))
    model.layers[1].register_buffer("layer_scalar", torch.ones(1))
    made = packed(model)
    assert [isinstance(layer, Merged) for layer in made.model.layers] == [True, False, True]


@pytest.mark.parametrize("name", ["gelu_10", "silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_an_activation_is_known_by_what_it_gives_far_out_too(name):
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    assert layer_parts._activation_of(ACT2FN[name]) == known.get(name)


@pytest.mark.parametrize("odd", [lambda x: x.float(), lambda x: (x, x), lambda x: x[:3], None])
def test_an_activation_that_gives_anything_else_is_not_known(odd):
    assert layer_parts._activation_of(odd) is None


class Bounded(LlamaMLP):
    """As those with a limit for what they multiply."""

    def forward(self, x):
        up = self.up_proj(x).clamp(-4, 4)
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=4)) * up)


def test_a_feed_forward_that_bounds_what_it_multiplies_is_the_modules_own():
    model = model_of(LlamaConfig(**SMALL))
    model.layers[1].mlp.__class__ = Bounded
    made = packed(model)
    assert [isinstance(layer, Merged) for layer in made.model.layers] == [True, False, True]


def test_a_layer_without_the_size_of_its_heads_is_left_alone():
    layer = model_of(LlamaConfig(**SMALL)).layers[0]
    assert layer_parts.parts_of(layer, movable=frozenset()) is not None
    layer.self_attn.head_dim = None
    assert layer_parts.parts_of(layer, movable=frozenset()) is None


def both_ways():
    return [packed(model_of(LlamaConfig(**SMALL)), merged=merged) for merged in (True, False)]


def tripled(module, given, output):
    return output * 3


def raised(module, given, output):
    output.add_(1)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["mlp", "self_attn", "self_attn.k_proj", "mlp.up_proj",
                                  "input_layernorm", "post_attention_layernorm"])  # fmt: skip
def test_hooks_that_come_later_act_and_go(name, copied):
    made, plain = both_ways()
    if copied:
        made = copy.deepcopy(made)
    before = outputs(made)
    change = (lambda *given: (2 * given[2][0], given[2][1])) if name == "self_attn" else tripled
    handles = [each.model.layers[1].get_submodule(name).register_forward_hook(change)
               for each in (made, plain)]  # fmt: skip
    assert not torch.allclose(outputs(made), before, atol=1e-3)
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(outputs(made), before)


def test_a_forward_that_comes_later_acts():
    made, plain = both_ways()
    for each in (made, plain):
        each.model.layers[1].mlp.forward = torch.zeros_like
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


def test_hooks_of_every_module_act():
    made, plain = both_ways()
    seen = [0, 0]
    for i, each in enumerate((made, plain)):

        def count(*given, i=i):
            seen[i] += 1

        with torch.nn.modules.module.register_module_forward_hook(count):
            outputs(each)
    assert seen[0] == seen[1] > 30


def test_a_hook_that_writes_to_what_a_layer_gives_acts_whole():
    made, plain = both_ways()
    for each in (made, plain):
        each.model.layers[0].register_forward_hook(raised)
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


def test_a_model_that_fails_its_check_merged_goes_on_without(monkeypatch, caplog):
    plain = packed(model_of(LlamaConfig(**SMALL)), merged=False)
    made = PackedModel(model_of(LlamaConfig(**SMALL)), "the test's", fused=True, merged=True,
                       cache_tokens=99)  # fmt: skip
    assert merged_of(made.model)
    for layer in merged_of(made.model):
        layer.merged.how = layer.merged.how._replace(scaling=9.0)
        layer.merged.follower = None
    check_packed(made)
    assert not merged_of(made.model)
    assert "the test's: its decoder layers run unmerged" in caplog.text
    assert torch.equal(outputs(made), outputs(plain))
    with torch.no_grad():
        made.model.norm.weight.add_(1)
    made.begin_call()
    assert not merged_of(made.model)


def held_bytes(model):
    """Of what a model's parameters and its merged layers lie in."""
    held = list(model.parameters())
    for layer in merged_of(model):
        parts = layer.merged.parts
        held += [parts.projections._weight, parts.feed_forward.both._weight]
    storages = [each.untyped_storage() for each in held if each is not None]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def test_a_copy_holds_its_weights_once_and_stays_what_it_is():
    made = packed(model_of(LlamaConfig(**SMALL)))
    once = sum(each.nbytes for each in made.model.parameters())
    assert held_bytes(made.model) == once
    copied = copy.deepcopy(made)
    assert held_bytes(copied.model) == once
    assert held_bytes(copy.deepcopy(made.model)) == once
    outputs(copied)
    assert not copied.changed()
    assert copied.model.layers[0].merged.parts.projections._weight is not None


def is_joined(joint):
    return joint._weight is not None and joint._lies_there()


def test_tied_weights_are_not_moved():
    made, plain = (model_of(LlamaConfig(**SMALL)) for _ in range(2))
    for model in (made, plain):
        first, second = model.layers[:2]
        second.self_attn.k_proj.weight = first.self_attn.k_proj.weight
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    made, plain = packed(made), packed(plain, merged=False)
    assert len(merged_of(made.model)) == 3
    for _ in range(3):
        made.begin_call()
        torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)
    assert made.changes == 0
    parts = [layer.merged.parts for layer in made.model.layers]
    assert [is_joined(each.projections) for each in parts] == [False, False, True]
    assert [is_joined(each.feed_forward.both) for each in parts] == [False, False, True]


def test_two_who_share_their_weights_leave_each_other_alone():
    model = model_of(LlamaConfig(**SMALL))
    kept = [*model.parameters(), *model.buffers()]
    one, two = (packed(each) for each in
                (model, copy.deepcopy(model, {id(each): each for each in kept})))  # fmt: skip
    for each in (one, two) * 3:
        each.begin_call()
        outputs(each)
    assert (one.changes, two.changes) == (0, 0)
    assert is_joined(one.model.layers[0].merged.parts.projections)
    assert is_joined(two.model.layers[0].merged.parts.projections)


def test_other_numbers_in_the_same_modules_are_not_tried_again(monkeypatch):
    made, plain = both_ways()
    layers = [layer.merged for layer in made.model.layers]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(packed_model, "merge_layers", None)
        for each in (made, plain):
            first, second = each.model.layers[:2]
            first.self_attn.k_proj.weight.mul_(2)
            second.input_layernorm.weight.add_(1)
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = second.self_attn.get_submodule(name).weight
                weight.data = weight.data * 3
            each.begin_call()
    assert made.changes == 1
    assert [layer.merged for layer in made.model.layers] == layers
    assert all(is_joined(layer.parts.projections) for layer in layers)
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


def test_one_weight_that_somebody_moved_is_left_where_it_is():
    made, plain = both_ways()
    for each in (made, plain):
        weight = each.model.layers[0].self_attn.k_proj.weight
        weight.data = weight.data * 2
        each.begin_call()
    place = made.model.layers[0].self_attn.k_proj.weight.data_ptr()
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)
    assert made.model.layers[0].self_attn.k_proj.weight.data_ptr() == place
    assert not is_joined(made.model.layers[0].merged.parts.projections)


def test_new_parameters_are_joined_anew():
    made, plain = both_ways()
    for each in (made, plain):
        fresh = {name: value * 2 for name, value in each.model.state_dict().items()}
        each.model.load_state_dict(fresh, assign=True)
        each.begin_call()
    assert all(is_joined(layer.merged.parts.projections) for layer in made.model.layers)
    torch.testing.assert_close(outputs(made), outputs(plain), rtol=0, atol=1e-5)


def test_parameters_of_inference_mode_are_not_moved():
    with torch.inference_mode():
        model = AutoModel.from_config(LlamaConfig(**SMALL)).eval()
    made = packed(model)
    assert len(merged_of(made.model)) == 3
    assert made.model.layers[0].self_attn.q_proj.weight.is_inference()
    assert outputs(made).isfinite().all()


def test_how_many_layers_are_merged_is_logged(caplog):
    model = model_of(LlamaConfig(**SMALL))
    model.layers[1].register_buffer("layer_scalar", torch.ones(1))
    with caplog.at_level("INFO", logger="guided_decode"):
        packed(model)
    assert "the test's: 2 of 3 decoder layers are merged" in caplog.text


def test_memory_is_counted_when_weights_are_in_their_places(monkeypatch):
    model, seen = model_of(LlamaConfig(**SMALL)), []
    counted = packed_model.default_capacity

    def capacity(*given):
        seen.append([layer.merged.parts.projections for layer in merged_of(model)])
        return counted(*given)

    monkeypatch.setattr(packed_model, "default_capacity", capacity)
    packed(model, cache_tokens=None, live_tokens=99)
    assert [is_joined(each) for each in seen[0]] == [True] * 3


@pytest.mark.parametrize(("joins", "wanted"), [(False, 13), (True, 10)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_a_model_that_is_shared_is_thirteen_launches_and_ten_where_weights_lie_together(
    monkeypatch, joins, wanted, bias
):
    def count(layers):
        config = LlamaConfig(
            **SMALL | {"num_hidden_layers": layers}, attention_bias=bias, mlp_bias=bias
        )
        model = model_of(config, torch.bfloat16)
        if joins:
            assert join_weights(model) == 2 * layers
        made = packed(comes_from(model, Origin((), lambda: model)))
        assert len(merged_of(model)) == layers
        with monkeypatch.context() as patch, Launches(patch) as counter:
            outputs(made)
        return counter.count

    assert (count(4) - count(2)) / 2 == wanted
