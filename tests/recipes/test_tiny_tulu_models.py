"""The released models: format, size, and what the critic knows, by the recipe's own decoder."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from guided_decode import GuidanceConfig, tiny_tulu
from recipes.tiny_tulu.decoding import decode
from recipes.tiny_tulu.measure import Family, outcomes, value_auc

CLASSES = {
    "sft": "LlamaForCausalLM",
    "ppo": "LlamaForCausalLM",
    "value": "LlamaForTokenClassification",
}


@pytest.fixture(scope="module")
def family() -> Family:
    return Family.load(tiny_tulu.model_path("sft").parent)


@pytest.mark.parametrize("name", tiny_tulu.MODELS)
def test_layout_is_a_tulu_checkpoints(name: str) -> None:
    config = AutoConfig.from_pretrained(tiny_tulu.model_path(name))
    assert config.architectures == [CLASSES[name]]
    assert config.rope_parameters["rope_theta"] == 10_000
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (1, 2, 287)
    metadata = json.loads((tiny_tulu.model_path(name) / "config.json").read_text())["guided_decode"]
    if name == "value":
        assert config.num_labels == 1
        assert metadata == {
            "kind": "ppo-critic",
            "family": "tiny-tulu",
            "bos": "drop",
            "terminal": "baseline",
        }
    else:
        assert metadata == {"kind": "policy", "family": "tiny-tulu"}


def test_models_load_in_float32_with_a_head_that_has_no_bias(family: Family) -> None:
    assert {p.dtype for p in family.value.parameters()} == {torch.float32}
    assert {
        p.dtype for p in type(family.sft).from_pretrained(tiny_tulu.model_path("sft")).parameters()
    } == {torch.float32}
    assert family.value.score.bias.item() == 0.0
    assert family.value.score.weight.shape == (1, 128)


def test_each_model_carries_the_same_tokenizer() -> None:
    first, *others = (AutoTokenizer.from_pretrained(tiny_tulu.model_path(n)) for n in CLASSES)
    for other in others:
        assert other.get_vocab() == first.get_vocab()
        assert other.chat_template == first.chat_template
        assert other("</s> 12").input_ids == first("</s> 12").input_ids


def test_all_together_are_at_most_6_megabytes() -> None:
    root = tiny_tulu.model_path("sft").parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 6_000_000


def test_policy_answers_alike_with_and_without_bos(family: Family) -> None:
    for message in tiny_tulu.validation_prompts(5):
        ids = family.tokenizer(tiny_tulu.render(message), return_tensors="pt").input_ids
        with_bos = family.sft.generate(ids, max_new_tokens=80, do_sample=False)
        without = family.sft.generate(ids[:, 1:], max_new_tokens=80, do_sample=False)
        assert with_bos[0, 1:].tolist() == without[0].tolist()
        assert without[0, -1] == family.tokenizer.eos_token_id


def test_values_tell_right_from_wrong_halfway(family: Family) -> None:
    messages = tiny_tulu.held_out_prompts(250)
    sampled = decode(family.sft, family.tokenizer, messages, sample=True)
    right = outcomes(messages, sampled)
    assert 0.4 < right.mean() < 0.65
    assert value_auc(family, messages, sampled, right, fraction=0.5) >= 0.80


def test_guidance_lifts_the_sft_policy_by_40_points(family: Family) -> None:
    messages = tiny_tulu.held_out_prompts(100)
    plain = decode(family.sft, family.tokenizer, messages)
    guided = decode(
        family.sft,
        family.tokenizer,
        messages,
        value_model=family.value,
        config=GuidanceConfig(beta=6.0, top_k=4),
    )
    before, after = outcomes(messages, plain).mean(), outcomes(messages, guided).mean()
    assert 0.25 < before < 0.50
    assert after > before + 0.40
    assert (plain.kl == 0).all()
    assert (guided.kl > 0).any()
