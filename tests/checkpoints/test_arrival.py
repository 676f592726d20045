"""Files that did not arrive whole: one line that names the file, and why."""

import json
import re

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.checkpoints.checkpoint import load_causal_lm, load_checkpoint
from tests.checkpoints.checkpoint_files import write
from tests.checkpoints.tokenizer_files import word_tokenizer
from tests.models import tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 976\n"


@pytest.fixture
def folder(tmp_path):
    tiny("llama", "sequence").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def refused(match, path, **options):
    with pytest.raises(ValueError, match=match) as caught:
        load_scorer(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "why"), [(POINTER, "is a git-lfs pointer: expected .* git lfs pull"),
                         (b"", "is empty: expected .* download it again")],
)  # fmt: skip
def test_pointers_and_empty_files_are_named(folder, file, content, why):
    (folder / file).write_bytes(content)
    refused(f"{file} {why}", folder)


def test_half_a_file(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("model.safetensors cannot be read as safetensors weights .* bytes came", folder)


@pytest.mark.parametrize("content", [POINTER, b"", b"PK\x03\x04 cut", b"\x80\x02 cut"])
def test_pickles_that_did_not_arrive_whole(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    refused("pytorch_model.bin (is|cannot be read as pickled weights)", folder, allow_pickle=True)


def test_half_a_shard_and_a_broken_index(tmp_path):
    tiny("llama", "sequence").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(f"{shard.name} cannot be read as safetensors", tmp_path)
    for index in ("{}", "[1]", '{"weight_map": [1]}', "{"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        refused("index.json cannot be read as an index of shards in JSON", tmp_path)


def test_a_tokenizer_without_a_part_of_it(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["added_tokens"], content["model"]
    path.write_text(json.dumps(content))
    refused("the tokenizer of .* cannot be read .*: expected the files that save_pret", folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "wide"}, "config.json cannot be read as .* 'hidden_size' expected int"),
        ({"num_hidden_layers": [2]}, "cannot be read as .*'num_hidden_layers' expected int"),
        ({"vocab_size": None}, "config.json cannot be read as a model's config: .*'vocab_size'"),
        ({"num_attention_heads": 0}, "config.json cannot be read as a model's config"),
        ({"id2label": 3}, "config.json cannot be read as a model's config"),
        # Older transformers refuse it themselves.
        ({"architectures": [3]}, r"architectures.* \[3\].*expected"),
        ({"hidden_act": "zap"}, "its weights do not fit its config; .* 'zap'"),
    ],
)
def test_a_config_of_the_wrong_types(folder, fields, message):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    refused(message, folder)


def test_a_pad_token_outside_the_vocabulary(tmp_path):
    path = write(tmp_path, tiny("llama", "sequence"), pad_token_id=101)
    refused("pad_token_id 101 in its config.json is outside the vocabulary of 101 tokens, "
            "ids 0 to 100: set it to one of them or to null", path)  # fmt: skip


def test_embeddings_of_another_size_name_the_tensor_and_both_shapes(tmp_path):
    path = write(tmp_path, tiny("llama", "lm"), vocab_size=102)
    message = re.escape(
        "embed_tokens.weight has the shape [101, 48], where the config makes [102, 48]"
    )
    with pytest.raises(ValueError, match=message):
        load_causal_lm(path)


@pytest.mark.parametrize(
    ("name", "called"),
    [("score.weight", "score.weight"), ("model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_")],
)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_called_so(tmp_path, name, called, odd):
    weight = tiny("llama", "sequence").state_dict()[name].clone()
    weight[0, 3] = odd
    path = write(tmp_path, tiny("llama", "sequence"), add={name: weight})
    refused(f"has NaN or infinity in {re.escape(called)}", path)


def test_weights_in_a_wrapper_are_read_without_it(tmp_path):
    model = tiny("llama", "lm")
    weights = {f"pretrained_model.{k}": v for k, v in model.state_dict().items()}
    head = torch.ones(1, 48)
    path = write(tmp_path, model, drop=tuple(model.state_dict()),
                 add=weights | {"v_head.summary.weight": head})  # fmt: skip
    checkpoint = load_checkpoint(path, "value-head")
    assert torch.equal(checkpoint.head_weight, head)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        checkpoint.trunk(ids).last_hidden_state, model.model(ids).last_hidden_state
    )
