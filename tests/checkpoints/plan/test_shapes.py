"""Shapes against transformers' own modules, built on the meta device: every weight is counted."""

import json
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.named import planned_policy, planned_scorer
from guided_decode.checkpoints.plan.shape_of_config import BUILDS, read_config
from guided_decode.checkpoints.registry import POLICIES, REGISTRY, find
from guided_decode.checkpoints.shape import Shape
from guided_decode.forward.pool_size import layer_layout

SIZES = dict(
    vocab_size=203, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2,
)  # fmt: skip
# (class of the config, what it has beside the sizes).
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "llama, all heads keyed": ("LlamaConfig", {"num_key_value_heads": None}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("LlamaConfig", {"head_dim": 20}),
    "mistral": ("MistralConfig", {}),
    "mistral, wide heads": ("MistralConfig", {"head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "qwen3, biases": ("Qwen3Config", {"head_dim": 12, "attention_bias": True}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma 2": ("Gemma2Config", {"head_dim": 16}),
    "gemma 2, untied": ("Gemma2Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma 3": ("Gemma3TextConfig", {"head_dim": 8}),
}


def config_of(case):
    name, more = CONFIGS[case]
    return getattr(transformers, name)(**{**SIZES, **more})


def on_meta(build, config):
    with torch.device("meta"):
        return build(config)


def count(model):
    return sum(weight.numel() for weight in model.parameters())


def written(config, architecture, folder):
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_a_policy_of_a_config_has_the_weights_of_its_module(case, tmp_path):
    model = on_meta(AutoModelForCausalLM.from_config, config_of(case))
    model.tie_weights()
    folder = written(model.config, type(model).__name__, tmp_path)
    planned = planned_policy(str(folder))
    assert planned.parameters == count(model)
    assert planned.weight_bytes() == 2 * count(model)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_critic_of_a_config_has_a_head_and_no_language_model_head(case, tmp_path):
    config = config_of(case)
    config.num_labels = 1
    model = on_meta(AutoModelForSequenceClassification.from_config, config)
    folder = written(model.config, type(model).__name__, tmp_path)
    kind, (planned,) = planned_scorer(str(folder))
    assert kind == "reward-model"
    assert planned.parameters == count(model)


def test_a_token_classifier_has_a_bias_on_its_head(tmp_path):
    config = config_of("llama")
    config.num_labels = 3
    model = on_meta(transformers.LlamaForTokenClassification, config)
    folder = written(model.config, "LlamaForTokenClassification", tmp_path)
    _, (planned,) = planned_scorer(str(folder), "classifier")
    assert (planned.labels, planned.head_bias) == (3, True)
    assert planned.parameters == count(model)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_cached_token_takes_what_the_modules_own_cache_gives_it(case, tmp_path):
    model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.bfloat16)
    shape = read_config(written(model.config, "", tmp_path) / "config.json").shape
    layers, _ = layer_layout(model)
    assert shape.kv_bytes() == sum(2 * heads * (keys + values) for heads, keys, values in layers)


def test_fields_that_a_config_leaves_out_are_its_classes_defaults(tmp_path):
    """As old and hand-written configs do: no key-value heads, no head_dim, no tie."""
    classes = {
        "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config", "gemma": "GemmaConfig", "gemma2": "Gemma2Config",
        "gemma3_text": "Gemma3TextConfig",
    }  # fmt: skip
    assert set(classes) == set(BUILDS)
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 32}
    del sizes["num_key_value_heads"]
    for kind, name in classes.items():
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"model_type": kind, **sizes}))
        model = on_meta(AutoModelForCausalLM.from_config, getattr(transformers, name)(**sizes))
        model.tie_weights()
        shape = read_config(path).shape
        assert shape.parameters(lm_head=True) == count(model), kind


# The heads of classes that are not transformers' own, by their published code.
OWN_HEADS = {
    "CriticModel": lambda hidden: nn.Linear(hidden, 1, bias=False),
    "Qwen2ForClassifier": lambda hidden: nn.Sequential(
        nn.Linear(hidden, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 3, bias=False)
    ),
    "Qwen2ForProcessRewardModel": lambda hidden: nn.Sequential(
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
    ),
    "Qwen2ForPrmModel": lambda hidden: nn.Linear(hidden, 1),
}
REAL = [record for record in REGISTRY if record.assets is None]


@pytest.mark.parametrize("record", REAL, ids=lambda record: record.name)
def test_a_registered_checkpoint_has_the_weights_of_its_class(record):
    shape = record.shape
    # Critics of OpenRLHF's build do not say what their trunk is: all of them are Qwen2.5's.
    stem = re.match("(?:Llama|Mistral|Qwen[23])?", record.architecture)[0] or "Qwen2"
    more = {} if shape.head_size is None else {"head_dim": shape.head_size}
    config = getattr(transformers, f"{stem}Config")(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_labels=1, tie_word_embeddings=shape.tied, **more,
    )  # fmt: skip
    if record.architecture in OWN_HEADS:
        model = on_meta(AutoModel.from_config, config)
        model.head = on_meta(OWN_HEADS[record.architecture], shape.hidden)
    else:
        model = on_meta(getattr(transformers, record.architecture), config)
        model.tie_weights()
    assert record.weight_bytes == 2 * count(model)
    if record.kind is None:
        assert planned_policy(record.name).parameters == count(model)
        return
    _, planned = planned_scorer(record.name)
    if record.is_causal_lm and record.kind == "process-reward":
        # Two rows of the language-model head are read.
        assert planned[0].parameters == count(model.model) + 2 * shape.hidden
    else:
        assert planned[0].parameters == count(model)


def test_every_policy_and_reference_of_the_registry_has_a_shape():
    named = {name for record in REAL for name in (record.policy, record.reference) if name}
    # Some have records of their own.
    assert named - {record.name for record in REGISTRY} == set(POLICIES)
    for name in named:
        assert planned_policy(name).shape == planned_policy(name.rpartition("/")[2]).shape


def test_a_config_of_the_package_has_its_registered_shape():
    record = find("tiny-tulu-value")
    assert read_config_of(record.location) == record.shape


def read_config_of(folder):
    from pathlib import Path

    return read_config(Path(folder) / "config.json").shape


def test_a_tied_head_is_read_though_it_takes_no_memory_of_its_own():
    sizes = (2, 8, 16, 2, 2, 100)
    tied = PlannedModel("tied", "", Shape(*sizes, tied=True), lm_head=True)
    untied = PlannedModel("untied", "", Shape(*sizes), lm_head=True)
    assert untied.weight_bytes() - tied.weight_bytes() == 2 * 100 * 8
    assert untied.read_bytes() == tied.read_bytes()
