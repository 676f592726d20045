"""What a tensor-parallel plan needs of a checkpoint, which its config says."""

from dataclasses import replace

import pytest
import torch

from guided_decode import Adapted, load_scorer
from guided_decode.checkpoints import tensor_parallel
from guided_decode.checkpoints.adapter_files import AdapterFiles
from guided_decode.checkpoints.source import open_source
from guided_decode.checkpoints.tensor_parallel import check_divides, check_vocabulary_divides
from tests import models
from tests.checkpoints.gguf_files import write_gguf


def source(**changes):
    found = open_source(models.saved("llama", "token"))
    for name, value in changes.items():
        setattr(found.config, name, value)
    return found


@pytest.mark.parametrize(
    ("changes", "shards", "message"),
    [
        ({}, 3, "has 4 attention heads, which 3 processes cannot share evenly: run torchrun with "
         "--nproc-per-node of 2 processes"),
        ({}, 4, "has 2 key-value heads, which 4 processes .* of 2 processes"),
        ({"num_attention_heads": 64, "num_key_value_heads": 8}, 3, "of 2, 4, 8 processes"),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, 2, "1 key-value heads, .* of one "),
        ({"num_key_value_heads": None}, 8, "4 attention heads, which 8 processes .* of 2, 4 "),
        ({"base_model_tp_plan": None}, 2, "is a llama, for which transformers has no tensor-paral"),
        ({"quantization_config": {"quant_method": "fp8"}}, 2, "is quantised: tp_plan=\"auto\""),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(changes, shards, message):
    with pytest.raises(ValueError, match=message):
        check_divides(source(**changes), shards)


ADAPTED = "has a PEFT adapter, of which no rank has a shard: .* merge it into its base"


def test_an_adapters_files_are_refused_as_whoever_they_belong_to(tmp_path):
    files = AdapterFiles(str(tmp_path), None, "", {})
    with pytest.raises(ValueError, match=f"^lora {ADAPTED}"):
        check_divides(replace(source(), name="lora", adapter=files), 2)


@pytest.mark.parametrize("model", ["MODEL", models.tiny("llama", "token")])
def test_a_plan_does_not_go_with_an_adapter(model):
    with pytest.raises(ValueError, match='tp_plan="auto" came with adapter, which it does not go'):
        load_scorer(model, "verl-critic", adapter="ADAPTER", tp_plan="auto")
    with pytest.raises(ValueError, match=f"^a model given as Adapted {ADAPTED}"):
        load_scorer(Adapted(model, "ADAPTER"), "verl-critic", tp_plan="auto")


@pytest.mark.parametrize(
    "given", [{"quantization": "int8"}, {"gguf_file": "x.gguf"}, {"device_map": "auto"}]
)
def test_a_plan_does_not_go_with_what_places_or_packs_weights_otherwise(given):
    (name,) = given
    with pytest.raises(ValueError, match=f'tp_plan="auto" came with {name}, which it does not go'):
        load_scorer("MODEL", "verl-critic", tp_plan="auto", **given)


def test_a_device_is_the_ranks_own(monkeypatch):
    monkeypatch.setattr(tensor_parallel, "join_ranks", lambda: None)
    monkeypatch.setattr(tensor_parallel, "device_of_rank", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(tensor_parallel.dist, "get_world_size", lambda: 1)
    for given in ("cuda", "cuda:1"):
        assert tensor_parallel.open_shards("auto", "MODEL", torch.device(given)) is None
    for given in ("cuda:0", "cuda:2", "cpu"):
        with pytest.raises(ValueError, match=r"expected none, since .* own device \(cuda:1 here\)"):
            tensor_parallel.open_shards("auto", "MODEL", torch.device(given))


def test_a_gguf_file_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package")
    write_gguf(tmp_path / "critic.gguf", models.tiny("llama", "token"), "F32")
    found = open_source(tmp_path / "critic.gguf")
    with pytest.raises(ValueError, match='is a GGUF file, which tp_plan="auto" does not cut: drop'):
        check_divides(found, 2)


def test_attention_that_stays_whole_on_each_rank_divides_by_anything():
    check_divides(source(base_model_tp_plan={"layers.*.mlp.down_proj": "rowwise_split_input"}), 3)


def test_a_vocabulary_has_to_divide():
    check_vocabulary_divides(source(vocab_size=102), 2)
    with pytest.raises(ValueError, match="a vocabulary of 101 tokens, which the output layer of 2"):
        check_vocabulary_divides(source(), 2)
