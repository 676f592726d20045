"""Names: the registry, folders and config.json files; what cannot be planned is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from guided_decode.checkpoints.plan import Workload, find_card
from guided_decode.checkpoints.plan.footprint import policy_load
from guided_decode.checkpoints.plan.named import planned_policy, planned_scorer
from guided_decode.checkpoints.plan.placement import make_plan
from guided_decode.checkpoints.plan.stored_weights import stored_weights
from guided_decode.checkpoints.plan.weight_forms import FORMS
from guided_decode.checkpoints.registry import find
from guided_decode.checkpoints.shape import LLAMA_2_13B
from tests import models

CONFIG = {
    "model_type": "llama", "vocab_size": 203, "hidden_size": 48, "intermediate_size": 112,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with a config.json of these fields."""

    def write(architecture="LlamaForCausalLM", **fields):
        config = {**CONFIG, "architectures": [architecture], **fields}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "name", ["allenai/tulu-2-13b", "tulu-2-13b", "tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm"]
)
def test_policies_of_the_registry_go_by_name(name):
    policy = planned_policy(name)
    assert policy.shape == LLAMA_2_13B
    assert policy.lm_head
    assert policy.name.startswith("allenai/")


def test_a_folder_and_its_config_alone_say_the_same(folder):
    where = folder()
    policy = planned_policy(str(where))
    assert planned_policy(str(where / "config.json")).parameters == policy.parameters
    assert policy.note is None


def test_a_folder_of_a_registered_name_has_its_kind_and_its_own_shape(folder, tmp_path):
    named = tmp_path / "tulu-v2.5-7b-uf-mean-7b-uf-rm-value"
    named.mkdir()
    folder("LlamaForTokenClassification", id2label={"0": "V"}).joinpath("config.json").rename(
        named / "config.json"
    )
    kind, (critic,) = planned_scorer(str(named))
    assert (kind, critic.shape.hidden, critic.labels) == ("ppo-critic", 48, 1)


@pytest.mark.parametrize(
    ("fields", "given", "kind", "count"),
    [
        ({"architecture": "LlamaForSequenceClassification", "id2label": {"0": "R"}}, {},
         "reward-model", 1),
        ({"architecture": "LlamaForTokenClassification", "id2label": {"0": "V"},
          "guided_decode": {"kind": "verl-critic"}}, {}, "verl-critic", 1),
        ({"architecture": "LlamaForCausalLM"}, {"kind": "value-head"}, "value-head", 1),
        ({"architecture": "LlamaForCausalLM"}, {"reference": "tiny-tulu-sft"}, "implicit", 2),
        ({"architecture": ""}, {"kind": "implicit", "reference": "tiny-tulu-sft"}, "implicit", 2),
    ],
)  # fmt: skip
def test_the_kind_goes_by_what_was_given_and_by_evidence(folder, fields, given, kind, count):
    found, planned = planned_scorer(str(folder(**fields)), **given)
    assert (found, len(planned)) == (kind, count)
    assert [model.lm_head for model in planned] == [kind == "implicit"] * count
    assert [model.labels for model in planned] == [0 if kind == "implicit" else 1] * count


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta-llama/Llama-3.2-1B",
         r"is not in the registry \(did you mean meta-llama/Llama-3.2-1B-Instruct\?\), and a plan "
         r"fetches nothing: give a folder with its config.json \(hf download meta-llama/Llama-3.2"),
        ("tulu-2-13", r"tulu-2-13: unknown model \(did you mean tulu-2-13b\?\); expected a name"),
        ("./nowhere", r"\./nowhere: no such folder"),
        ("tcp://127.0.0.1:7070", r"is a scorer server: give the model that it serves"),
        ("allenai/Llama-3.1-Tulu-3-8B-RM",
         r"is a LlamaForSequenceClassification: a policy is a causal LM; give the scorer second"),
    ],
)  # fmt: skip
def test_a_policy_that_is_not_known_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        planned_policy(name)


def test_a_folder_without_a_config_and_a_file_that_is_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json: expected what save_pretrained"):
        planned_policy(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter: give its base model, whose size it has"):
        planned_policy(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model.gguf is a file: expected a folder, a config.json"):
        planned_policy(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json is no JSON \(.*\): mend it or download it again"),
        ("[]", r"config.json holds a list: expected a model's config"),
        ("{}", r"has model_type None, whose layers are not counted: expected one of llama, mis"),
        (json.dumps({**CONFIG, "model_type": "mamba"}), r"has model_type 'mamba', whose layers"),
        (json.dumps({"model_type": "gemma3", "text_config": CONFIG}),
         r"holds its text model's config inside another one \(a multimodal model\)"),
        (json.dumps({**CONFIG, "hidden_size": None}),
         r"has hidden_size None: expected an integer of at least 1; mend it"),
        (json.dumps({**CONFIG, "num_hidden_layers": -1}), r"has num_hidden_layers -1: expected"),
        (json.dumps({**CONFIG, "vocab_size": "many"}), r"has vocab_size 'many': expected"),
        (json.dumps({**CONFIG, "architectures": "Llama"}),
         r"has architectures 'Llama': expected a list with the name of its class"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_counted_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        planned_policy(str(tmp_path))


def test_a_scorer_whose_kind_nothing_shows_is_refused(folder):
    for architecture in ("LlamaForCausalLM", "LlamaForTokenClassification"):
        with pytest.raises(
            ValueError, match=rf"\({architecture}\) does not say what kind of scorer it is: pass ki"
        ):
            planned_scorer(str(folder(architecture)))
    with pytest.raises(ValueError, match="kind 'oracle': expected one of ppo-critic"):
        planned_scorer(str(folder()), "oracle")
    with pytest.raises(ValueError, match="brings no second model: there is nothing to place"):
        planned_scorer(str(folder()), "trunk-head")
    with pytest.raises(ValueError, match=r"is an implicit reward.* but no reference came with it"):
        planned_scorer(str(folder()), "implicit")


@pytest.mark.parametrize("kind", ["lm", "token", "sequence"])
def test_the_files_of_a_checkpoint_confirm_its_config(kind, tmp_path):
    model = models.tiny("llama", kind)
    model.save_pretrained(tmp_path)
    held = stored_weights(tmp_path)
    assert held.weights == sum(weight.numel() for weight in model.parameters())
    assert held.bytes == 4 * held.weights
    assert planned_scorer(str(tmp_path), "value-head")[1][0].note is None


def test_shards_are_read_through_their_index(tmp_path):
    model = models.tiny("llama", "lm")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert stored_weights(tmp_path).weights == sum(w.numel() for w in model.parameters())
    next(tmp_path.glob("model-*.safetensors")).unlink()
    assert stored_weights(tmp_path) is None


def test_files_that_are_of_another_model_are_noted(folder):
    where = folder()
    save_file({"weight": torch.zeros(48, 203)}, where / "model.safetensors")
    note = planned_policy(str(where)).note
    assert "its safetensors hold 9,744 weights where its config.json makes" in note
    plan = make_plan(str(where), "tiny-tulu-value", find_card("80GB"), Workload())
    assert note in plan.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"model.safetensors is no safetensors file: download it again"),
        (b"\xff" * 64, r"model.safetensors is no safetensors file"),
        (b"\x40" + bytes(7) + b'{"weight": {', r"model.safetensors did not arrive whole"),
        (b"\x02" + bytes(7) + b"[]", r"model.safetensors is no safetensors file"),
        (b"\x17" + bytes(7) + b'{"weight": {"shape": 1}}'[:23], r"did not arrive whole"),
    ],
)
def test_files_that_did_not_arrive_whole_are_refused(folder, content, message):
    where = folder()
    (where / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        planned_policy(str(where))


def test_a_checkpoint_that_is_quantised_already_counts_its_files(folder):
    where = folder(quantization_config={"quant_method": "gptq", "bits": 4})
    tensors = {"a": torch.zeros(8, 16, dtype=torch.int32), "b": torch.zeros(8, dtype=torch.float16)}
    save_file(tensors, where / "model.safetensors")
    policy = planned_policy(str(where))
    assert (policy.stored, policy.weight_bytes()) == ("gptq", 8 * 16 * 4 + 8 * 2)
    with pytest.raises(ValueError, match=r"is quantised already \(gptq\) and came with quanti"):
        make_plan("tiny-tulu-sft", str(where), find_card("80GB"), Workload(),
                  quantization="int8", kind="value-head")  # fmt: skip
    plan = make_plan("tiny-tulu-sft", str(where), find_card("80GB"), Workload(), kind="value-head")
    # As a policy it is vLLM's, which cuts quantised weights, too.
    assert policy_load(policy, Workload(), 2).weights == policy.weight_bytes() // 2
    # Nothing is said of how its matrices could be cut, or quantised once more.
    assert {one.way.shards for one in plan.placements} == {1}
    assert {one.way.form.name for one in plan.placements} == {"bf16"}


def test_of_a_quantised_config_alone_only_bitsandbytes_is_counted(folder):
    where = folder(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    plain = planned_policy(str(folder()))
    quantised = planned_policy(
        str(folder(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))
    )
    assert quantised.stored == "bnb-8bit"
    assert quantised.weight_bytes() == plain.weight_bytes(FORMS["bnb-8bit"])
    folder(quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantised \(awq\), and no safetensors lie beside it"):
        planned_policy(str(where))


def test_vocabularies_that_differ_are_noted():
    plan = make_plan("allenai/tulu-2-13b", "allenai/Llama-3.1-Tulu-3-8B-RM", find_card("80GB"),
                     Workload())  # fmt: skip
    assert any("vocabularies have 32,000 and 128,264 tokens" in note for note in plan.notes)
    same = make_plan("tiny-tulu-ppo", "tiny-tulu-value", find_card("80GB"), Workload())
    assert same.notes == ()


def test_rows_beyond_a_models_positions_are_noted(folder):
    where = str(folder(max_position_embeddings=1024))
    plans = [make_plan(where, "tiny-tulu-value", find_card("80GB"), Workload(1, length))
             for length in (1024, 1025)]  # fmt: skip
    notes = [[note for note in plan.notes if "tokens at most" in note] for plan in plans]
    assert notes == [[], [f"{where} reads 1,024 tokens at most, and the rows have 1,025"]]


def test_a_plan_needs_neither_torch_nor_transformers():
    code = """
import sys
from guided_decode.checkpoints.plan import Workload, find_card, make_plan
plan = make_plan("tulu-2-13b", "tulu-2-dpo-70b", find_card("80GB"), Workload())
assert plan.take is not None
print({"torch", "transformers", "safetensors"} & set(sys.modules))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


def test_a_registered_checkpoint_in_the_package_is_read_like_any_other():
    by_name = planned_policy("tiny-tulu-ppo")
    by_folder = planned_policy(find("tiny-tulu-ppo").location)
    assert by_name.parameters == by_folder.parameters
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(find("tiny-tulu-ppo").location)
        module = AutoModelForCausalLM.from_config(config)
    module.tie_weights()
    assert by_name.parameters == sum(weight.numel() for weight in module.parameters())
