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
