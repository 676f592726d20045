"""The registry: every name resolves, and the figures are those of the real checkpoints."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from guided_decode.checkpoints.checkpoint import load_causal_lm, load_checkpoint
from guided_decode.checkpoints.families import FAMILIES
from guided_decode.checkpoints.prompts import FORMATS
from guided_decode.checkpoints.registry import (
    CHAT_TEMPLATE,
    POLICY_TEMPLATE,
    REGISTRY,
    Shape,
    find,
    location_of,
)
from guided_decode.checkpoints.tokenizer_files import tokenizer_home
from guided_decode.checkpoints.tokenizer_match import check_tokenizers

FIVE = [
    ("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value", "ppo-critic", "tulu-2"),
    ("allenai/tulu-2-dpo-70b", "implicit", "tulu-2"),
    ("allenai/llama-3.1-tulu-2-70b-uf-mean-rm", "reward-model", "tulu-2"),
    ("allenai/Llama-3.1-Tulu-3-8B-RM", "reward-model", "tulu-3"),
    ("ContextualAI/Contextual_KTO_Mistral_PairRM", "implicit", "tulu-2"),
]
SIBLINGS = [
    ("hamishivi/tulu-v2.5-7b-uf-rm-value", "ppo-critic", "tulu-2"),
    ("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-uf-rm-value", "ppo-critic", "tulu-2"),
    ("allenai/llama-3.1-tulu-2-8b-uf-mean-rm", "reward-model", "tulu-2"),
]


@pytest.mark.parametrize(("name", "kind", "prompt_format"), FIVE + SIBLINGS)
def test_the_checkpoints_are_found_with_their_conventions(name, kind, prompt_format):
    record = find(name)
    assert record is not None
    assert (record.kind, record.prompt_format) == (kind, prompt_format)


@pytest.mark.parametrize(("name", "kind", "prompt_format"), FIVE + SIBLINGS)
def test_bare_names_and_local_paths_find_the_same_record(name, kind, prompt_format, tmp_path):
    bare = name.rpartition("/")[2]
    assert find(bare) is find(name)
    assert find(tmp_path / bare) is None
    (tmp_path / bare).mkdir()
    assert find(tmp_path / bare) is find(name)
    assert find(f"{tmp_path}/{bare}/") is find(name)


@pytest.mark.parametrize("name", ["tulu-2-dpo", "someone/else", "", ".", "/", "TULU-2-DPO-70B"])
def test_other_names_are_not_found(name):
    assert find(name) is None


def test_another_owners_repository_of_the_same_name_is_not_the_checkpoint():
    assert find("mirror/tulu-2-dpo-70b") is None


def test_records_name_known_kinds_and_formats_and_fit_their_families():
    for record in REGISTRY:
        assert record.prompt_format in (*FORMATS, CHAT_TEMPLATE), record.name
        if record.kind is not None:
            assert FAMILIES[record.kind].takes(record.architecture), record.name
        if record.kind == "implicit":
            assert record.reference, record.name


def test_policies_are_prompted_as_their_scorers_but_for_the_kto_pair():
    two = [record.name for record in REGISTRY if not record.one_format]
    assert two == ["ContextualAI/Contextual_KTO_Mistral_PairRM"]
    assert find(two[0]).policy_format == POLICY_TEMPLATE


def test_names_are_unique():
    names = [name for record in REGISTRY for name in set(record.names)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "gigabytes", "kv_bytes"),
    [
        # Sums of the files on the Hub, in bfloat16.
        ("tulu-v2.5-ppo-13b-uf-mean-13b-uf-rm-value", 25.7, 819_200),
        ("tulu-v2.5-7b-uf-mean-7b-uf-rm-value", 13.2, 524_288),
        ("Contextual_KTO_Mistral_PairRM", 14.5, 131_072),
        ("llama-3.1-tulu-2-70b-uf-mean-rm", 139.0, 327_680),
    ],
)
def test_memory_follows_from_the_shape(name, gigabytes, kv_bytes):
    record = find(name)
    assert record.weight_bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert record.shape.kv_bytes() == kv_bytes


@pytest.mark.parametrize("part", ["sft", "ppo", "value"])
def test_tiny_tulu_resolves_to_its_folder_in_the_package(part):
    record = find(f"tiny-tulu-{part}")
    config = json.loads((Path(record.location) / "config.json").read_text())
    assert config["architectures"] == [record.architecture]
    assert record.shape == Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
    )


def test_tiny_tulus_value_model_loads_by_name_and_reads_its_policys_tokens():
    critic = load_checkpoint("tiny-tulu-value")
    assert (critic.family.kind, critic.family.bos) == ("ppo-critic", "drop")
    for part in ("sft", "ppo"):
        location = find(f"tiny-tulu-{part}").location
        check_tokenizers(AutoTokenizer.from_pretrained(location), critic.tokenizer)
        assert load_causal_lm(f"tiny-tulu-{part}").config.vocab_size == critic.record.shape.vocab


def test_a_folder_is_itself_whatever_it_is_called(tmp_path):
    (folder := tmp_path / "tulu-2-7b").mkdir()
    (own := tmp_path / "tulu-2-dpo-7b").mkdir()
    assert [location_of(one) for one in (folder, own, str(own))] == [
        str(one) for one in (folder, own, own)
    ]
    assert location_of("tulu-2-dpo-7b") == "allenai/tulu-2-dpo-7b"
    assert location_of("somebody/tulu-2-dpo-7b") == "somebody/tulu-2-dpo-7b"
    # An adapter's base may be one.
    given = {"peft_type": "LORA", "base_model_name_or_path": str(own)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert tokenizer_home(str(tmp_path)) == (str(own), None)
