"""What a scorer's copy of a model in memory shares with it, and what it does not."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guided_decode.checkpoints.own_copy import own_copy
from guided_decode.forward.merged_layers import Merged
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.weights import Origin, comes_from

IDS = torch.tensor([[2, 5, 9, 13]])


def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_layers_of_a_policy_that_was_asked_for_hidden_states_are_merged():
    model = policy()
    model(IDS, output_hidden_states=True, output_attentions=True)
    assert hooks(model), "transformers reads hidden states in another way than this test knows"
    copied = own_copy(model.base_model)
    made = PackedModel(
        comes_from(copied, Origin((), lambda: copied)), "it", cache_tokens=30, merged=True
    )
    assert made.merged_layers == sum(isinstance(each, Merged) for each in copied.layers) == 2


def test_a_copy_gives_hidden_states_as_often_as_it_is_asked_and_the_model_goes_on_to():
    model = policy()
    wanted = model(IDS, output_hidden_states=True).hidden_states
    copied = own_copy(model)
    assert not hooks(copied)
    for _ in range(2):
        for each in (copied, model):
            found = each(IDS, output_hidden_states=True).hidden_states
            assert len(found) == 3
            torch.testing.assert_close(found, wanted)


def test_hooks_of_others_come_along():
    model, calls = policy(), []
    model(IDS, output_hidden_states=True)
    model.model.layers[1].register_forward_hook(lambda *given: calls.append(given))
    copied = own_copy(model)
    assert len(hooks(copied)) == 1
    copied(IDS)
    assert len(calls) == 1
