"""`guided-decode models`: the registry as a person and as a program reads it."""

import json

import pytest
from typer.testing import CliRunner

from guided_decode.checkpoints.registry import REGISTRY
from guided_decode.cli.app import app
from guided_decode.cli.models import size


def models(*args):
    result = CliRunner().invoke(app, ["models", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_has_every_record_with_what_it_needs():
    lines = {line["name"]: line for line in json.loads(models("--json"))}
    assert list(lines) == [record.name for record in REGISTRY]
    critic = lines["allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value"]
    assert critic["kind"] == "ppo-critic"
    assert critic["prompt_format"] == "tulu-2"
    assert critic["policy"] == "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm"
    # 40 layers of 5,120 wide keys and values, two bytes each.
    assert critic["kv_bytes_per_1k_tokens"] == 1_000 * 2 * 40 * 5_120 * 2
    assert critic["weight_bytes_bf16"] == pytest.approx(25.7e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "bos", "read", "terminal", "formats", "format_bos"),
    [
        ("allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value", "drop", "token", "baseline",
         ("tulu-2", "tulu-2"), True),
        ("allenai/Llama-3.1-Tulu-3-8B-RM", "keep", "eos", "critic", ("tulu-3", "tulu-3"), False),
        ("ContextualAI/Contextual_KTO_Mistral_PairRM", "policy", "token", "included",
         ("tulu-2", "chat template"), True),
        ("tiny-tulu-sft", None, None, None, ("tulu-3", "tulu-3"), False),
    ],
)  # fmt: skip
def test_json_says_how_each_is_read(name, bos, read, terminal, formats, format_bos):
    line = next(line for line in json.loads(models("--json")) if line["name"] == name)
    assert (line["bos"], line["read"], line["terminal"]) == (bos, read, terminal)
    assert (line["prompt_format"], line["policy_format"]) == formats
    assert line["prompt_format_bos"] is format_bos


def test_the_table_says_how_each_is_read(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = "\n".join(line.rstrip() for line in models().splitlines())
    for record in REGISTRY:
        described = next(part for part in text.split("\n\n") if record.name in part)
        assert ("read at" in described) == (record.kind is not None), record.name
    assert "BOS dropped · read at each token · an end has A = 0" in text
    assert "BOS kept · read at EOS · an end has Q = V(s·EOS)" in text
    assert "BOS as the policy's · read at each token · ends scored like any token" in text
    assert "guides mistralai/Mistral-7B-Instruct-v0.2, prompted by its own chat template" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_names_every_checkpoint_whole(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = models()
    assert max(map(len, text.splitlines())) <= width
    for record in REGISTRY:
        assert record.name in text


def test_a_narrow_terminal_costs_no_figures(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = models()
    assert "…" not in text
    assert "23.9 GiB" in text


def test_sizes_have_units():
    assert [size(n) for n in (512, 4_096, 12 << 30, 128 << 30, 1 << 40)] == [
        "512 B", "4.0 KiB", "12.0 GiB", "128 GiB", "1.0 TiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "way", "quantization", "gpus", "described"),
    [
        ("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value", "one-gpu", "bnb-4bit", 1,
         "one 80 GB GPU: bnb-4bit beside the policy"),
        ("allenai/tulu-2-dpo-70b", "own-gpu", "bnb-4bit", 2,
         "2 80 GB GPUs: bnb-4bit on a GPU of its own"),
        ("allenai/llama-3.1-tulu-2-70b-uf-mean-rm", "own-gpu", "bnb-8bit", 3,
         "3 80 GB GPUs: bnb-8bit on a GPU of its own, the policy over 2"),
        ("allenai/Llama-3.1-Tulu-3-8B-RM", "one-gpu", None, 1,
         "one 80 GB GPU: bf16 beside the policy"),
        ("ContextualAI/Contextual_KTO_Mistral_PairRM", "one-gpu", None, 1,
         "one 80 GB GPU: bf16 beside the policy"),
    ],
)  # fmt: skip
def test_both_say_which_way_fits_an_80_gb_gpu(
    name, way, quantization, gpus, described, monkeypatch
):
    line = next(line for line in json.loads(models("--json")) if line["name"] == name)
    fits = line["fits_80gb"]
    assert (fits["way"], fits["quantization"], fits["gpus"]) == (way, quantization, gpus)
    assert fits["described"] in described
    monkeypatch.setenv("COLUMNS", "160")
    text = "\n".join(line.rstrip() for line in models().splitlines())
    part = next(part for part in text.split("\n\n") if name in part)
    assert described in part


def test_a_policy_that_scores_nothing_fits_no_way():
    lines = {line["name"]: line for line in json.loads(models("--json"))}
    assert lines["tiny-tulu-sft"]["fits_80gb"] is None
    assert all(line["fits_80gb"] for line in lines.values() if line["kind"] is not None)
