"""`guided-decode scorer` reads weights as other commands do: quantised, GGUF, with adapters."""

import functools

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner

from guided_decode import PrefixHandle, load_scorer, tiny_tulu
from guided_decode.cli.app import app
from tests import adapters
from tests.adapters import adapted, saved
from tests.checkpoints.gguf_files import write_gguf
from tests.checkpoints.quantised_models import needs
from tests.serving import process
from tests.serving.served import CLOSE

VALUE, BASE = tiny_tulu.model_path("value"), tiny_tulu.model_path("sft")
PROMPT = "What is 4785 + 5426?"


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(VALUE)


def scores_of(scorer):
    """Along a growing prefix, [tokens, 2]."""
    handle, found = PrefixHandle(tokenizer().encode(PROMPT)), []
    for token in (5, 6, 7):
        found.append(scorer.score([handle], torch.tensor([[3, 4]])).values[0])
        handle.append(token)
    return torch.stack(found)


@needs("torchao")
def test_quantised_and_placed_by_a_map():
    words = ("tiny-tulu-value", "--quantization", "int8", "--device-map", '{"": "cpu"}')
    with process.started(*words) as server:
        remote = load_scorer(server.address, "ppo-critic", policy_tokenizer=tokenizer())
        got = scores_of(remote)
        assert server.end() == 0
        assert server.process.stderr.read() == ""
    local = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer(), quantization="int8")
    torch.testing.assert_close(got, scores_of(local), **CLOSE)
    plain = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer())
    assert not torch.allclose(got, scores_of(plain), **CLOSE)


@needs("gguf")
@pytest.mark.parametrize("head", ["beside", "given"])
def test_a_gguf_file_and_its_head(tmp_path, head):
    model = AutoModelForTokenClassification.from_pretrained(VALUE)
    write_gguf(tmp_path / "value.gguf", model, "F32")
    tokenizer().save_pretrained(tmp_path)
    words = (tmp_path, "--gguf-file", "value.gguf", "--head", VALUE)
    if head == "beside":
        save_file({"score.weight": model.score.weight.detach()},
                  tmp_path / "value_head.safetensors")  # fmt: skip
        words = (tmp_path / "value.gguf",)
    with process.started(*words, "--kind", "ppo-critic") as server:
        # The family that clients hold it to, and the tokenizer that theirs is compared with.
        remote = load_scorer(server.address, "ppo-critic", policy_tokenizer=tokenizer())
        got = scores_of(remote)
    wanted = scores_of(load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer()))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)


@needs("gguf")
def test_no_such_gguf_file(tmp_path):
    (tmp_path / "value.gguf").touch()
    words = ["scorer", str(tmp_path), "--gguf-file", "other.gguf", "--kind", "ppo-critic",
             "--listen", "tcp://127.0.0.1:0"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "has no other.gguf: expected one of its GGUF files (value.gguf" in result.stderr


@needs("peft")
def test_an_adapter_on_a_base():
    """The family that clients hold it to is the adapter's: its base is a language model."""
    model = adapted("SEQ_CLS", str(BASE))
    with process.started(BASE, "--adapter", saved(model)) as server:
        scorer = load_scorer(server.address, "reward-model", policy_tokenizer=tokenizer())
        ids = tokenizer().encode(PROMPT)
        got = scorer.score([ids], torch.full((1, 1), -1)).baseline.item()
    assert got == pytest.approx(adapters.values(model)(ids), abs=1e-4)
