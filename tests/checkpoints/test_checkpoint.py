"""Loading: checkpoints with the real classes, config fields and quirks, small and random."""

import copy
import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from guided_decode.checkpoints.checkpoint import load_causal_lm, load_checkpoint
from guided_decode.scoring.transforms import Clip, Normalise, Sigmoid, SoftmaxClass
from tests.checkpoints.checkpoint_files import outputs, stock, write
from tests.models import ARCHITECTURES, VOCAB, model_class, saved, saved_value_head, tiny

IDS = torch.tensor([[5, 6, 7, 8, 9]])
KINDS = {"token": "verl-critic", "sequence": "reward-model"}


@pytest.fixture
def critic(tmp_path):
    """A folder as EasyLM's converter wrote it: no score.bias, pad_token null, one label."""
    return write(tmp_path, tiny("llama", "token"), drop=["score.bias"], pad_token_id=None)


# -- what loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["token", "sequence"])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
@pytest.mark.parametrize("from_memory", [False, True])
def test_a_classification_checkpoint_equals_its_class(arch, head, from_memory):
    if (arch, head) == ("gemma3", "token"):
        with pytest.raises(LookupError):
            model_class(arch, head)
        return
    model = tiny(arch, head)
    checkpoint = load_checkpoint(model if from_memory else saved(arch, head), KINDS[head])
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(model, IDS))
    assert checkpoint.head_weight.dtype == torch.float32
    assert checkpoint.trunk.config._attn_implementation == "eager"
    assert not checkpoint.trunk.training
    assert not any(weight.requires_grad for weight in checkpoint.trunk.parameters())


def test_an_easylm_critic_loads_by_its_kind(critic):
    checkpoint = load_checkpoint(critic, "ppo-critic")
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(tiny("llama", "token"), IDS))
    assert checkpoint.head_bias is None
    assert (checkpoint.family.bos, checkpoint.family.terminal) == ("drop", "baseline")
    assert checkpoint.prompt_format == "tulu-2"
    assert checkpoint.max_positions == 512
    assert checkpoint.tokenizer is None


@pytest.mark.parametrize("style", ["trl", "openrlhf"])
def test_value_heads_load_from_both_trainers_layouts(style):
    checkpoint = load_checkpoint(saved_value_head(style), "value-head")
    bias = 0.75 if style == "trl" else 0.0
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(tiny("llama", "token"), IDS) + bias)


@pytest.mark.parametrize("kind", ["ppo-critic", "value-head"])
def test_a_config_that_names_no_class_is_judged_by_its_head(tmp_path, kind):
    model = tiny("llama", "token")
    checkpoint = load_checkpoint(write(tmp_path, model, architectures=None), kind)
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(model, IDS))


def test_openrlhf_names_its_head_in_the_config_and_may_normalise(tmp_path):
    lm, head = tiny("llama", "lm"), tiny("llama", "token").score.weight.clone()
    path = write(
        tmp_path,
        lm,
        drop=["lm_head.weight"],
        add={"reward_head.weight": head, "value_head.weight": torch.zeros_like(head)},
        value_head_prefix="reward_head",
        normalize_reward=True,
        mean=0.5,
        std=2.0,
    )
    checkpoint = load_checkpoint(path, "value-head")
    assert torch.equal(checkpoint.head_weight, head)
    assert checkpoint.transform == Normalise(0.5, 2.0)


@pytest.mark.parametrize(("labels", "transform"), [(3, SoftmaxClass(1)), (1, Sigmoid())])
def test_classifiers_read_their_class_by_their_labels(labels, transform):
    checkpoint = load_checkpoint(saved("qwen2", "token", labels=labels), "classifier")
    assert checkpoint.transform == transform
    assert checkpoint.head_weight.shape == (labels, 48)
    value = checkpoint.transform(outputs(checkpoint, IDS))
    wanted = stock(tiny("qwen2", "token", labels=labels), IDS)
    wanted = wanted.softmax(-1)[:, 1] if labels == 3 else wanted.sigmoid()[:, 0]
    torch.testing.assert_close(value, wanted)


def test_a_sharded_checkpoint_equals_a_whole_one(tmp_path):
    model = tiny("llama", "token")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = load_checkpoint(tmp_path, "ppo-critic")
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(model, IDS))


def test_a_pickle_loads_when_it_is_allowed(tmp_path):
    model = tiny("llama", "sequence")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="weights in pytorch_model.bin, a pickle: expected safetensors; convert"
    ):
        load_checkpoint(tmp_path)
    checkpoint = load_checkpoint(tmp_path, allow_pickle=True)
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(model, IDS))


def test_a_model_in_memory_shares_its_weights_and_is_not_changed():
    model = copy.deepcopy(tiny("llama", "token")).train().requires_grad_(True)
    model.set_attn_implementation("sdpa")
    checkpoint = load_checkpoint(model, "ppo-critic", dtype=torch.float32)
    checkpoint.trunk.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    theirs = dict(model.model.named_parameters())
    for name, weight in checkpoint.trunk.named_parameters():
        assert weight.data_ptr() == theirs[name].data_ptr(), name
        assert weight is not theirs[name]


def test_another_dtype_leaves_the_model_in_memory_as_it_was():
    model = copy.deepcopy(tiny("llama", "token"))
    checkpoint = load_checkpoint(model, "ppo-critic", dtype=torch.bfloat16)
    assert checkpoint.trunk.dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_two_loads_share_no_config():
    model = tiny("llama", "sequence")
    first, second = load_checkpoint(model), load_checkpoint(model)
    configs = {id(m.config) for m in (first.trunk, second.trunk, model)}
    assert len(configs) == 3
    layer = first.trunk.layers[0].self_attn
    assert layer.config is first.trunk.config


def test_the_checkpoints_tokenizer_comes_with_it(critic):
    core = Tokenizer(tokenizer_models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(critic)
    tokenizer = load_checkpoint(critic, "ppo-critic").tokenizer
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", None)


# -- rules that are given -----------------------------------------------------------------------


def test_rules_are_overridden_by_the_caller(critic):
    checkpoint = load_checkpoint(
        critic, "ppo-critic", bos="keep", terminal="critic", transform="clip:0,1"
    )
    assert (checkpoint.family.bos, checkpoint.family.terminal) == ("keep", "critic")
    assert checkpoint.transform == Clip(0.0, 1.0)


def test_metadata_of_our_tools_decides_and_the_caller_still_overrides(tmp_path):
    metadata = {"kind": "verl-critic", "bos": "drop", "terminal": "critic"}
    path = write(tmp_path, tiny("llama", "token"), guided_decode=metadata)
    family = load_checkpoint(path).family
    assert (family.kind, family.bos, family.terminal) == ("verl-critic", "drop", "critic")
    assert load_checkpoint(path, terminal="baseline").family.terminal == "baseline"
    # Another kind is another trainer: its own rules hold.
    assert load_checkpoint(path, "ppo-critic").family.terminal == "baseline"


def test_a_registered_name_decides(tmp_path):
    path = tmp_path / "tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value"
    write(path, tiny("llama", "token"), drop=["score.bias"])
    checkpoint = load_checkpoint(path)
    assert checkpoint.family.kind == "ppo-critic"
    assert checkpoint.record.policy == "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm"


def test_a_sequence_head_with_one_label_is_a_reward_model(tmp_path):
    checkpoint = load_checkpoint(saved("llama", "sequence"))
    assert (checkpoint.family.kind, checkpoint.family.read) == ("reward-model", "eos")


@pytest.mark.parametrize(
    ("head", "labels", "kinds"),
    [
        ("token", 1, "ppo-critic, verl-critic, value-head, classifier"),
        ("token", 3, "classifier"),
        ("sequence", 3, "classifier"),
        ("token", 2, 'classifier with transform="softmax:CLASS", .* one of its 2 labels'),
        ("lm", 1, "implicit"),
    ],
)
def test_auto_stops_without_evidence_and_lists_what_it_could_be(head, labels, kinds):
    with pytest.raises(ValueError, match=f'kind="auto" has no evidence .* could be {kinds}; pass'):
        load_checkpoint(saved("llama", head, labels=labels))


def test_auto_lists_the_kinds_of_a_value_head():
    with pytest.raises(ValueError, match="could be value-head, reward-model, implicit; pass kind="):
        load_checkpoint(saved_value_head("trl"))


def test_policy_metadata_is_no_evidence_of_a_critic(tmp_path):
    path = write(tmp_path, tiny("llama", "lm"), guided_decode={"kind": "policy"})
    with pytest.raises(ValueError, match="could be implicit"):
        load_checkpoint(path)


# -- rope ---------------------------------------------------------------------------------------


def test_the_converters_wrong_rope_theta_is_refused_and_can_be_put_right(tmp_path):
    right = tiny("llama", "token", rope_theta=10_000.0)
    path = write(tmp_path, right, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    with pytest.raises(ValueError, match="has rope_theta 100000: .* pass rope_theta=10000, or"):
        load_checkpoint(path, "ppo-critic")
    mended = load_checkpoint(path, "ppo-critic", rope_theta=10_000)
    torch.testing.assert_close(outputs(mended, IDS), stock(right, IDS))
    kept = load_checkpoint(path, "ppo-critic", rope_theta=100_000)
    assert (outputs(kept, IDS) - stock(right, IDS)).abs().max() > 1e-3


def test_rope_theta_of_other_families_is_taken_as_it_is(tmp_path):
    model = tiny("llama", "token", rope_theta=100_000.0)
    checkpoint = load_checkpoint(write(tmp_path, model), "verl-critic")
    torch.testing.assert_close(outputs(checkpoint, IDS), stock(model, IDS))


def test_a_config_written_before_rope_parameters_is_read(tmp_path):
    model = tiny("llama", "token")
    path = write(tmp_path, model, rope_theta=100_000.0, rope_scaling=None)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has rope_theta 100000"):
        load_checkpoint(path, "ppo-critic")


# -- language models ----------------------------------------------------------------------------


@pytest.mark.parametrize("from_memory", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_language_model_equals_its_class_on_its_own_config(arch, from_memory):
    model = tiny(arch, "lm")
    loaded = load_causal_lm(model if from_memory else saved(arch, "lm"))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config is not model.config
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_tied_embeddings_stay_tied():
    model = tiny("llama", "lm", tie_word_embeddings=True)
    loaded = load_causal_lm(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert (
        load_causal_lm(saved("llama", "lm", tie_word_embeddings=True))(IDS).logits.shape[-1]
        == VOCAB
    )
