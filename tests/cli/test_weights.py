"""`guided-decode score` on scorers whose weights are quantised, or lie in a GGUF file."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner

from guided_decode import load_scorer, tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.model_options import read_device_map
from guided_decode.cli.run_identity import fingerprint
from tests.checkpoints.gguf_files import write_gguf
from tests.checkpoints.quantised_models import needs

VALUE = tiny_tulu.model_path("value")


def score(*args, expected=0):
    result = CliRunner().invoke(app, ["score", *map(str, args)])
    assert result.exit_code == expected, result.output
    return result


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    prompts = tiny_tulu.held_out_prompts(3)
    answers = [tiny_tulu.worked_answer(*tiny_tulu.operands(prompt)) for prompt in prompts]
    lines = [json.dumps({"prompt": p, "response": a})
             for p, a in zip(prompts, answers, strict=True)]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return path


def scores_of(scorer, chats):
    """Values at the last token of each response, by the scorer itself."""
    tokenizer, found = AutoTokenizer.from_pretrained(VALUE), []
    for line in map(json.loads, chats.read_text().splitlines()):
        text = tiny_tulu.render(line["prompt"]) + line["response"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        found.append(scorer.score([ids], torch.full((1, 1), -1)).baseline.item())
    return found


def read(path):
    return [json.loads(line)["score"] for line in path.read_text().splitlines()]


@needs("torchao")
def test_quantization(chats, tmp_path):
    out = tmp_path / "out.jsonl"
    score(chats, out, "--quantization", "int8", "--device", "cpu")
    wanted = scores_of(load_scorer(VALUE, "ppo-critic", quantization="int8"), chats)
    assert read(out) == pytest.approx(wanted, abs=1e-4)
    plain = scores_of(load_scorer(VALUE, "ppo-critic"), chats)
    assert read(out) != pytest.approx(plain, abs=1e-4)
    # The run's lines are not mixed with those of the plain scorer.
    refused = score(chats, out, "--device", "cpu", expected=2)
    assert "another" in refused.stderr


@needs("torchao")
def test_nothing_but_the_result_is_said(chats, tmp_path):
    """torchao is imported by transformers, and warns of what this machine has no kernels for."""
    command = [sys.executable, "-m", "guided_decode.cli", "score", chats, tmp_path / "out.jsonl",
               "--quantization", "int8", "--device", "cpu"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == f"3 chats are scored in {tmp_path / 'out.jsonl'}\n"


@needs("gguf")
@pytest.mark.parametrize("by_folder", [False, True])
def test_gguf_files(by_folder, chats, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(VALUE)
    folder = tmp_path / "value"
    folder.mkdir()
    write_gguf(folder / "value.gguf", model, "F32")
    save_file({"score.weight": model.score.weight.detach()}, folder / "value_head.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(VALUE / name, folder)
    which = (folder, "--gguf-file", "value.gguf") if by_folder else (folder / "value.gguf",)
    out = tmp_path / "out.jsonl"
    score(chats, out, "--kind", "ppo-critic", "--device", "cpu", "--prompt-format", "tulu-2",
          "--scorer", *which)  # fmt: skip
    assert read(out) == pytest.approx(scores_of(load_scorer(VALUE, "ppo-critic"), chats), abs=1e-3)


def test_a_runs_identity_has_the_gguf_file_and_what_lies_beside_it(tmp_path):
    for name in ("a.gguf", "b.gguf", "value_head.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    first = fingerprint(str(tmp_path / "a.gguf"))
    assert first == fingerprint(str(tmp_path), None, "a.gguf")
    assert first != fingerprint(str(tmp_path), None, "b.gguf")
    (tmp_path / "b.gguf").write_bytes(b"other")
    assert first == fingerprint(str(tmp_path / "a.gguf"))
    (tmp_path / "value_head.safetensors").write_bytes(b"other")
    assert first != fingerprint(str(tmp_path / "a.gguf"))


def test_unknown_names_and_maps(chats, tmp_path):
    out = tmp_path / "out.jsonl"
    refused = score(chats, out, "--quantization", "4bit", "--device", "cpu", expected=2)
    assert "--quantization 4bit: expected one of bnb-4bit, bnb-8bit, int8" in refused.stderr
    refused = score(chats, out, "--device-map", "{oops", expected=2)
    assert "expected a word such as auto, or a JSON object" in refused.stderr
    assert read_device_map('{"model.layers.0": 1}') == {"model.layers.0": 1}
    assert read_device_map("balanced") == "balanced"
