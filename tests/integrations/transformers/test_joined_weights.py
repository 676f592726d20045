"""Weights of a policy that lie together: the same model for everybody, and fewer products."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import TrunkLookahead, join_weights
from guided_decode.scoring.trunk_head import TrunkHead

CONFIG = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1,
          "pad_token_id": 0, "bos_token_id": 2}  # fmt: skip
IDS = torch.tensor([[2, 5, 9, 13]])


def policy(**own):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG | own)).eval()


def lie_together(model):
    """Of each layer's two groups, whether they do."""
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        ):
            place = group[0].weight.data_ptr()
            ends = []
            for each in group:
                ends.append(each.weight.data_ptr() == place)
                place += each.weight.nbytes
            found.append(all(ends))
    return found


def test_the_model_is_what_it_was(tmp_path):
    model, plain = policy(), policy()
    names = [name for name, _ in model.named_parameters()]
    assert join_weights(model) == 4
    assert lie_together(model) == [True] * 4
    assert lie_together(plain) == [False] * 4
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight), name


@torch.enable_grad()
def test_it_trains_as_it_would():
    model, plain = policy(), policy()
    join_weights(model)
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert lie_together(model) == [True] * 4
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)


def test_a_second_call_changes_nothing_and_one_after_a_move_puts_them_together_again():
    model = policy()
    join_weights(model)
    place = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert join_weights(model) == 4
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == place
    model.to(torch.float64)
    assert lie_together(model) == [False] * 4
    assert join_weights(model) == 4
    assert lie_together(model) == [True] * 4


def test_the_look_ahead_writes_the_same_tokens_and_follows_a_step_of_training():
    torch.manual_seed(1)
    head = TrunkHead(torch.randn(1, 32))
    models = [policy(), policy()]
    join_weights(models[0])
    loops = [
        TrunkLookahead(
            load_scorer(each, kind="trunk-head", head=copy.deepcopy(head)),
            GuidanceConfig(beta=3.0, top_k=4),
        )
        for each in models
    ]

    def written():
        return [
            each.generate(IDS, custom_generate=loop, max_new_tokens=8, do_sample=False).tolist()
            for each, loop in zip(models, loops, strict=True)
        ]

    before = written()
    assert before[0] == before[1]
    with torch.no_grad():
        for each in models:
            each.model.layers[1].self_attn.v_proj.weight.mul_(-5.0)
    after = written()
    assert after[0] == after[1]
    assert after != before


def test_what_is_tied_adapted_or_no_linear_layer_stays_where_it_is():
    tied = policy()
    tied.model.layers[1].self_attn.k_proj.weight = tied.model.layers[0].self_attn.k_proj.weight
    place = tied.model.layers[0].self_attn.k_proj.weight.data_ptr()
    assert join_weights(tied) == 2
    assert tied.model.layers[1].self_attn.k_proj.weight.data_ptr() == place
    adapted = get_peft_model(policy(), LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert join_weights(adapted) == 0
    assert join_weights(torch.nn.Linear(3, 3)) == 0


def test_parts_with_other_dtypes_stay_where_they_are():
    model = policy()
    model.model.layers[0].self_attn.v_proj.to(torch.float64)
    assert join_weights(model) == 3


@pytest.mark.parametrize("bias", [False, True])
def test_biases_go_with_them(bias):
    model, plain = policy(attention_bias=bias), policy(attention_bias=bias)
    with torch.no_grad():
        for each in (model, plain):
            for name, weight in each.named_parameters():
                if name.endswith("bias"):
                    weight.fill_(0.5)
    assert join_weights(model) == 4
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
