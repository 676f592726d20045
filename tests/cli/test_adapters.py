"""Commands take PEFT adapters where they take models, and `--adapter` puts one on a base."""

import functools
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.run_identity import fingerprint
from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head
from tests import adapters
from tests.adapters import adapted, saved

BASE = str(tiny_tulu.model_path("sft"))
PROMPT, ANSWER = "4+4?", "4+4=8"


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@functools.cache
def critic():
    """A critic on the policy's base, in memory and in a folder without a tokenizer."""
    model = without_bias(adapted("TOKEN_CLS", BASE))
    return model, saved(model)


def without_bias(model):
    """EasyLM's critics have none."""
    model.get_base_model().score.modules_to_save["default"].bias.data.zero_()
    return model


@functools.cache
def policy():
    model = adapted("CAUSAL_LM", BASE, seed=4)
    return model, saved(model)


def scored(tmp_path, *args, name="out.jsonl"):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "response": ANSWER}) + "\n")
    result = run("score", source, tmp_path / name, "--kind", "ppo-critic",
                 "--prompt-format", "tulu-3", *args)  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / name).read_text().splitlines()[0])


def value_of(model):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = tiny_tulu.render(PROMPT) + ANSWER
    return adapters.values(model)(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("how", ["folder", "put on", "one of several"])
def test_score(tmp_path, how):
    model, path = critic()
    inside = tmp_path / "run"
    shutil.copytree(path, inside / "critic")
    given = {
        "folder": ("--scorer", path),
        "put on": ("--scorer", BASE, "--adapter", path),
        "one of several": ("--scorer", inside, "--adapter", "critic"),
    }[how]
    with torch.no_grad():
        expected = value_of(model)
    assert scored(tmp_path, *given)["score"] == pytest.approx(expected, abs=1e-4)


def test_a_run_is_of_one_adapter_and_one_base(tmp_path):
    _, path = critic()
    other = saved(without_bias(adapted("TOKEN_CLS", BASE, seed=8)))
    copied = tmp_path / "base"
    shutil.copytree(BASE, copied)
    own = scored(tmp_path, "--scorer", path)["run"]
    # Where its files lie is another matter.
    assert scored(tmp_path, "--scorer", path, name="again.jsonl")["run"] == own
    assert scored(tmp_path, "--scorer", other, name="other.jsonl")["run"] != own
    runs = {
        scored(tmp_path, "--scorer", BASE, "--adapter", each, name=f"{i}.jsonl")["run"]
        for i, each in enumerate((path, other))
    }
    assert len(runs) == 2
    moved = tmp_path / "adapter"
    shutil.copytree(path, moved)
    file = moved / "adapter_config.json"
    file.write_text(file.read_text().replace(json.dumps(BASE), json.dumps(str(copied))))
    before = fingerprint(str(moved))
    config = copied / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert fingerprint(str(moved)) != before


def greedy(model):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = torch.tensor([tokenizer.encode(tiny_tulu.render(PROMPT), add_special_tokens=False)])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=12)  # fmt: skip
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def generated(*args):
    result = run("generate", "--prompt", PROMPT, "--max-new-tokens", 12, "--json", *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["text"]


def test_generate_decodes_an_adapted_policy():
    model, path = policy()
    unguided = ("--scorer", "tiny-tulu-value", "--beta", 0, "--tail", "keep")
    assert generated("--policy", path, *unguided) == greedy(model)
    plain = greedy(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32))
    assert generated("--policy", BASE, *unguided) == plain != greedy(model)


def test_a_head_on_the_hidden_states_of_an_adapted_policy(tmp_path):
    model, path = policy()
    head = tmp_path / "head.safetensors"
    save_trunk_head(head, TrunkHead(torch.randn(1, 128), None))
    for given in (("--policy", path), ("--policy", BASE, "--adapter", path)):
        texts = [generated(*given, "--head", head, "--beta", beta) for beta in (0, 30)]
        assert texts[0] == greedy(model) != texts[1]


def test_without_peft(tmp_path, monkeypatch):
    _, path = critic()
    monkeypatch.setitem(sys.modules, "peft", None)
    result = run("generate", "--prompt", PROMPT, "--scorer", path, "--policy", BASE,
                 "--kind", "ppo-critic")  # fmt: skip
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert "pip install 'guided-decode[peft]'" in result.stderr
    result = run("generate", "--prompt", PROMPT, "--policy", policy()[1], "--scorer",
                 "tiny-tulu-value")  # fmt: skip
    assert "pip install 'guided-decode[peft]'" in result.stderr


def test_an_adapter_that_is_not_there():
    result = run("generate", "--prompt", PROMPT, "--scorer", "tiny-tulu-value", "--policy", BASE,
                 "--adapter", "/no/such")  # fmt: skip
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert "--adapter" in result.stderr
