"""What does not fit is refused: errors name what came, what was expected and what to do."""

import json

import pytest
import torch
import transformers as tf

from guided_decode.checkpoints.checkpoint import load_causal_lm, load_checkpoint
from tests.checkpoints.checkpoint_files import write
from tests.models import saved, saved_value_head, tiny

LLAMA = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_labels=1,
)


@pytest.mark.parametrize(
    ("head", "kind", "message"),
    [
        ("lm", "ppo-critic", "is a LlamaForCausalLM: ppo-critic expects a class that ends in "
         "ForTokenClassification; pass kind=implicit"),
        ("sequence", "ppo-critic", "is a LlamaForSequenceClassification: ppo-critic expects"),
        ("token", "reward-model", "reward-model expects a class that ends in "
         "ForSequenceClassification or .*; pass kind=ppo-critic or verl-critic"),
        ("lm", "value-head", "has no head that value-head expects .one of v_head.summary.weight"),
        ("lm", "implicit", "as implicit, which is a pair of language models: .* load_causal_lm"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("from_memory", [False, True])
def test_the_wrong_head(head, kind, message, from_memory):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tiny("llama", head) if from_memory else saved("llama", head), kind)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("ppo-critic", 3, "num_labels 3: ppo-critic expects 1; pass kind=classifier"),
        ("verl-critic", 2, "num_labels 2: verl-critic expects 1; pass kind=classifier with"),
        ("classifier", 2, "expects 3 or 1; pass kind=classifier with transform=.softmax"),
    ],
)
def test_the_wrong_number_of_labels(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved("llama", "token", labels=labels), kind)


def test_labels_that_the_config_and_the_head_count_differently(tmp_path):
    path = write(tmp_path, tiny("llama", "token"), id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ValueError, match="num_labels 3 in its config and 1 in score.weight"):
        load_checkpoint(path, "ppo-critic")


def test_a_head_of_another_width(tmp_path):
    path = write(tmp_path, tiny("llama", "token"), add={"score.weight": torch.ones(1, 40)})
    with pytest.raises(ValueError, match=r"shape \[1, 40\]: expected \[labels, 48\], the trunk's"):
        load_checkpoint(path, "ppo-critic")


def test_a_transform_that_cannot_read_the_head():
    with pytest.raises(
        ValueError, match="transform softmax:1 cannot read the 1 labels .* identity"
    ):
        load_checkpoint(saved("llama", "token"), "ppo-critic", transform="softmax:1")


@pytest.mark.parametrize("from_memory", [False, True])
def test_a_bias_that_the_trainer_does_not_have(tmp_path, from_memory):
    path = write(tmp_path, tiny("llama", "token"), add={"score.bias": torch.tensor([0.25])})
    model = tf.LlamaForTokenClassification.from_pretrained(path) if from_memory else path
    with pytest.raises(ValueError, match=r"score.bias \[0.25\]: ppo-critic expects zero, because"):
        load_checkpoint(model, "ppo-critic")
    assert load_checkpoint(model, "verl-critic").head_bias.item() == 0.25


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (["score.weight"], "has no head that ppo-critic expects .one of score.weight."),
        (["model.norm.weight"], "lacks weights: norm.weight; expected exactly those of a llama"),
        (
            [
                f"model.layers.{i}.mlp.{p}_proj.weight"
                for i in (0, 1)
                for p in ("up", "down", "gate")
            ],
            "lacks weights: layers.0.mlp.down_proj.weight, .* and 1 more; expected",
        ),
    ],
)
def test_missing_weights(tmp_path, drop, message):
    path = write(tmp_path, tiny("llama", "token"), drop=drop)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, "ppo-critic")


def test_a_language_model_without_its_head(tmp_path):
    path = write(tmp_path, tiny("llama", "lm"), drop=["lm_head.weight"])
    with pytest.raises(ValueError, match="lacks weights: lm_head.weight"):
        load_causal_lm(path)


def test_more_layers_than_the_config_has(tmp_path):
    path = write(tmp_path, tiny("llama", "token"), num_hidden_layers=1)
    with pytest.raises(ValueError, match="no place for: model.layers.1.input_layernorm.weight"):
        load_checkpoint(path, "ppo-critic")


def test_weights_of_another_shape_than_the_config_says(tmp_path):
    path = write(tmp_path, tiny("llama", "token"), intermediate_size=80)
    with pytest.raises(ValueError, match="its weights do not fit its config; expected the two of"):
        load_checkpoint(path, "ppo-critic")


def test_a_shard_that_is_not_there(tmp_path):
    tiny("llama", "token").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, which model.safetensors.index.json"):
        load_checkpoint(tmp_path, "ppo-critic")


def test_a_folder_without_weights(tmp_path):
    tiny("llama", "token").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights: expected model.safetensors, or"):
        load_checkpoint(tmp_path, "ppo-critic")


def test_a_pickle_that_was_not_allowed_is_not_opened(tmp_path):
    tiny("llama", "token").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("never read")
    with pytest.raises(
        ValueError, match="in pytorch_model.bin, a pickle: .* pass allow_pickle=True"
    ):
        load_checkpoint(tmp_path, "ppo-critic")


def test_a_name_under_which_there_is_nothing(tmp_path):
    with pytest.raises(
        ValueError, match="nowhere: expected a folder with a config.json, a registe"
    ):
        load_checkpoint(tmp_path / "nowhere", "ppo-critic")


def test_a_module_that_is_no_transformers_model():
    with pytest.raises(ValueError, match="a Linear was given as a model: expected a name, a path"):
        load_checkpoint(torch.nn.Linear(1, 1), "ppo-critic")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "ppo"}, "kind 'ppo': expected one of ppo-critic, verl-critic"),
        ({"bos": "add"}, "bos='add': expected one of keep, drop, policy"),
        ({"terminal": "eos"}, "terminal='eos': expected one of baseline, reward, critic, included"),
        ({"transform": "relu"}, "transform 'relu': expected one of identity"),
        ({"transform": torch.sigmoid}, "a transform came as builtin_function_or_method: expected"),
        ({"kind": ["ppo-critic"]}, r"kind \['ppo-critic'\]: expected one of ppo-critic"),
        ({"rope_theta": "10000"}, "rope_theta='10000': expected a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: expected a finite number above 0"),
    ],
)
def test_rules_that_do_not_exist(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved("llama", "token"), **{"kind": "ppo-critic", **kwargs})


def test_metadata_that_is_no_object(tmp_path):
    path = write(tmp_path, tiny("llama", "token"), guided_decode="ppo-critic")
    with pytest.raises(
        ValueError, match="'guided_decode': 'ppo-critic' in its config: expected an"
    ):
        load_checkpoint(path)


def test_rope_theta_for_a_model_in_memory():
    with pytest.raises(ValueError, match="rope_theta=10000 was given for .*, a model in memory"):
        load_checkpoint(tiny("llama", "token"), "ppo-critic", rope_theta=10_000)


def test_rope_theta_where_each_layer_type_has_its_own():
    with pytest.raises(
        ValueError, match="whose config has 2 ropes: expected one; leave rope_theta"
    ):
        load_checkpoint(saved("gemma3", "sequence"), rope_theta=10_000)


def test_a_reference_that_is_no_language_model():
    for model in (saved("llama", "token"), tiny("llama", "token")):
        with pytest.raises(
            ValueError, match="LlamaForTokenClassification: a reference or implicit"
        ):
            load_causal_lm(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM: ppo-critic expects"):
        load_checkpoint(saved_value_head("trl"), "ppo-critic")


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "has rope_type dynamic: expected a causal decoder",
        ),
        (
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
            "has rope_type longrope: expected",
        ),
    ],
)
def test_rope_that_depends_on_the_rest_of_the_batch(rope, message):
    config = tf.LlamaConfig(**LLAMA, rope_parameters=rope | {"rope_theta": 1e4})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tf.LlamaForTokenClassification(config), "verl-critic")


def bert():
    return tf.BertForTokenClassification(tf.BertConfig(**LLAMA))


def gemma_both_ways():
    config = tf.Gemma3TextConfig(**LLAMA, head_dim=8, use_bidirectional_attention=True)
    return tf.Gemma3TextForSequenceClassification(config)


def recurrent():
    config = tf.Qwen3NextConfig(
        **LLAMA, num_key_value_heads=1, head_dim=8, layer_types=["linear_attention"],
        linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=1,
        linear_num_value_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    return tf.Qwen3NextForSequenceClassification(config)


def encoder_decoder():
    sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tf.T5ForSequenceClassification(tf.T5Config(**sizes, num_labels=1, eos_token_id=1))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (bert, "classifier", r"\(bert\) is bidirectional: expected a causal decoder"),
        (gemma_both_ways, "reward-model", r"\(gemma3_text\) is bidirectional"),
        (recurrent, "reward-model", r"\(qwen3_next\) has layers of type linear_attention"),
        (encoder_decoder, "classifier", r"\(t5\) is an encoder-decoder"),
    ],
)
def test_architectures_that_packed_scoring_cannot_run(make, kind, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(make(), kind)


def test_an_unreadable_config(tmp_path):
    tiny("llama", "token").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config)[:-5])
    with pytest.raises(ValueError, match="config.json cannot be read as a model's config: "):
        load_checkpoint(tmp_path, "ppo-critic")
