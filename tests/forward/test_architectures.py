"""Any decoder is either scored as brute force scores it, or refused when it is loaded."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from guided_decode import load_scorer
from tests import models, oracle

SIZES = {
    "vocab_size": models.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": models.POSITIONS,
    "pad_token_id": models.PAD,
    "bos_token_id": models.BOS,
    "eos_token_id": models.EOS,
    "num_labels": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Decoders that differ in what matters here: masks, positions, sinks, experts, recurrence.
DECODERS = {
    "gpt_oss": dict(head_dim=16, sliding_window=9, **EXPERTS),
    "phi3": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": 9},
    "mixtral": EXPERTS,
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "olmo2": {},
    "smollm3": {},
    "ministral": {"head_dim": 16, "sliding_window": 9},
    "exaone4": {"sliding_window": 9},
    "glm4": {"head_dim": 16},
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": models.POSITIONS},
    "gpt_neox": {},
    "opt": {"ffn_dim": 72, "word_embed_proj_dim": 48},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "bert": {},
    "llama dynamic rope": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    },
    "llama longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 6,
            "long_factor": [3.0] * 6,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama linear rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    },
    "llama yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        }
    },
    "gemma3_text bidirectional": {
        "head_dim": 16,
        "use_bidirectional_attention": True,
        "sliding_window": 9,
    },
}
MUST_REFUSE = {
    "jamba": "(?i)recurren|mamba|layer",
    "bert": "(?i)bert|causal|encoder|decoder|architecture|attention",
    "llama dynamic rope": "(?i)rope.*dynamic|dynamic.*rope",
    "llama longrope": "(?i)longrope",
    "gemma3_text bidirectional": "(?i)bidirectional|stock|causal|differ",
}
MUST_WORK = {"mixtral", "phi3", "olmo2", "qwen3_moe", "llama llama3 rope", "llama linear rope",
             "llama yarn rope"}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    own = {**SIZES, **DECODERS[name]}
    config = AutoConfig.for_model(name.split()[0], **own)
    config._attn_implementation = "eager"
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def stock_values(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """The class's own answer, one sequence at a time; none of them ends in the pad id."""
    return torch.tensor([model(torch.tensor([s])).logits.flatten()[-1].item() for s in sequences])


@pytest.mark.parametrize("name", list(DECODERS))
def test_scored_as_the_stock_class_or_refused(name):
    model = build(name)
    if name in MUST_REFUSE:
        with pytest.raises(ValueError, match=MUST_REFUSE[name]):
            load_scorer(model, kind="reward-model")
        return
    try:
        scorer = load_scorer(model, kind="reward-model")
    except ValueError:
        if name in MUST_WORK:
            raise
        return
    tokens = [5, 60, 99]
    rows = models.prompts([1, 4, 33], seed=4)
    for prefixes in (rows, [[*row, 60] for row in rows]):  # new, then from the cache
        scores = scorer.score(prefixes, torch.tensor([tokens] * 3))
        for prefix, values, baseline in zip(prefixes, *scores, strict=True):
            expected = stock_values(model, [[*prefix, t] for t in tokens] + [prefix])
            close = {"rtol": 0, "atol": 1e-4}
            torch.testing.assert_close(torch.cat([values, baseline[None]]), expected, **close)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_loading_leaves_the_callers_module_and_config_alone(arch):
    model = models.tiny.__wrapped__(arch, "token")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_json_string()
    implementation = model.config._attn_implementation
    scorer = load_scorer(model, kind="verl-critic")
    scorer.score([[5, 6]], torch.tensor([[7]]))
    assert model.config._attn_implementation == implementation
    assert model.config.to_json_string() == config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_loading_leaves_the_callers_dtype_mode_and_gradients_alone():
    model = models.tiny.__wrapped__("llama", "token").train().requires_grad_(True)
    exact = load_scorer(model, kind="verl-critic").score([[5, 6]], torch.tensor([[7]]))
    load_scorer(model, kind="verl-critic", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Dropout of a model that is being trained does not reach its scores.
    expected = oracle.Values(models.tiny("llama", "token"))([[5, 6, 7]])[0]
    assert exact.values.item() == pytest.approx(expected, abs=1e-4)


def test_weights_that_the_checkpoint_lacks_are_refused():
    source = Path(models.saved("llama", "token"))
    folder = Path(tempfile.mkdtemp(dir=models.scratch()))
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_scorer(str(folder), kind="verl-critic")


def with_score_bias(bias):
    """The path of the tiny critic with a given `score.bias`, or without one."""
    source = Path(models.saved("llama", "token"))
    folder = Path(tempfile.mkdtemp(dir=models.scratch()))
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    del weights["score.bias"]
    if bias is not None:
        weights["score.bias"] = torch.tensor([bias])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("kind", ["ppo-critic", "verl-critic"])
def test_a_missing_score_bias_is_zero(kind):
    scores = load_scorer(with_score_bias(None), kind=kind).score([[5, 6]], torch.tensor([[7]]))
    expected = oracle.Values(models.tiny("llama", "token"))([[5, 6, 7]])[0]
    assert scores.values.item() == pytest.approx(expected, abs=1e-4)


def test_a_score_bias_is_refused_where_the_trainer_had_none_and_used_where_it_had_one():
    with pytest.raises(ValueError, match=r"score\.bias.*0\.5"):
        load_scorer(with_score_bias(0.5), kind="ppo-critic")
    scorer = load_scorer(with_score_bias(0.5), kind="verl-critic")
    expected = 0.5 + oracle.Values(models.tiny("llama", "token"))([[5, 6, 7]])[0]
    scores = scorer.score([[5, 6]], torch.tensor([[7]]))
    assert scores.values.item() == pytest.approx(expected, abs=1e-4)


def test_a_head_that_does_not_belong_to_the_kind_is_refused():
    with pytest.raises(ValueError, match=r"(?i)LlamaForCausalLM|score"):
        load_scorer(models.saved("llama", "lm"), kind="verl-critic")
    with pytest.raises(ValueError, match=r"3.*label|label.*3"):
        load_scorer(models.saved("llama", "sequence", labels=3), kind="reward-model")


def test_an_unknown_kind_and_an_undecided_auto_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"critic2.*ppo-critic"):
        load_scorer(models.saved("llama", "token"), kind="critic2")
    with pytest.raises(ValueError, match=r"(?s)(?=.*ppo-critic)(?=.*verl-critic)"):
        load_scorer(models.saved("llama", "token"), kind="auto")


def test_auto_takes_a_sequence_classifier_of_one_label_for_a_reward_model():
    scorer = load_scorer(models.saved("llama", "sequence"))
    expected = oracle.Values(models.tiny("llama", "sequence"))([[5, 6, 7]])[0]
    scores = scorer.score([[5, 6]], torch.tensor([[7]]))
    assert scores.values.item() == pytest.approx(expected, abs=1e-4)
    assert scorer.terminal == "critic"


def test_pickled_weights_are_refused_unless_asked_for():
    folder = Path(tempfile.mkdtemp(dir=models.scratch()))
    model = models.tiny("llama", "token")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load_scorer(str(folder), kind="verl-critic")


def test_the_architectures_named_here_exist():
    for name in DECODERS:
        assert name.split()[0] in tf.CONFIG_MAPPING
