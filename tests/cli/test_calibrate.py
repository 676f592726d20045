"""`guided-decode calibrate`: the beta that it finds, the file that it writes, what it refuses."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.calibrate import embedded_task
from guided_decode.tiny_tulu import lists
from tests import models


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def prompts(tmp_path):
    def write(messages, name="prompts.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in messages))
        return file

    return write


def test_it_writes_what_generate_reads(prompts, tmp_path):
    file, settings = prompts(tiny_tulu.validation_prompts(12)), tmp_path / "guidance.yaml"
    others = prompts(tiny_tulu.held_out_prompts(6), "others.jsonl")
    result = run("calibrate", file, "--held-out", others, "--target-kl", 0.05, "--top-k", 5,
                 "--tail", "keep", "--rounds", 3, "--max-new-tokens", 30, "--dtype", "float32",
                 "--output", settings, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (found,) = report["results"]
    assert (report["prompts"], report["held_out_prompts"]) == (12, 6)
    assert found["kl"] == pytest.approx(0.05, rel=0.2)
    assert found["tokens"] >= found["rounds"] * 12 * 20
    assert 0 < found["held_out_kl"] < 0.2
    assert report["spread"]["deviation"] > 0
    # With so few prompts it cannot be certain, and says so.
    assert found["settled"] or "more prompts" in result.stderr
    written = yaml.safe_load(settings.read_text())
    assert written["models"] == {"policy": "tiny-tulu-sft", "scorer": "tiny-tulu-value",
                                 "dtype": "float32"}  # fmt: skip
    assert written["guidance"] == {
        "beta": pytest.approx(found["beta"], rel=1e-5), "top_k": 5, "top_p": 1.0,
        "rule": "reweight", "tail": "keep", "baseline": "prefix", "kl_coef": 0.0,
    }  # fmt: skip
    by_file = run("generate", "--prompt", "2468+1357=?", "--config", settings)
    typed = run("generate", "--prompt", "2468+1357=?", "--beta", written["guidance"]["beta"],
                "--top-k", 5, "--tail", "keep", "--dtype", "float32")  # fmt: skip
    assert by_file.exit_code == 0, by_file.output
    assert by_file.stdout == typed.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target-kl", 0), "--target-kl 0: expected nats above 0"),
        (("--target-kl", 0.1, "--beta", 2), "--beta 2 came, which calibrate finds"),
        (("--target-kl", 0.1, "--rule", "prune"), "--rule prune has no beta"),
        (("--target-kl", 0.1, "--target-kl", 0.2, "--output", "x.yaml"), "2 targets came"),
        (("--target-kl", 0.1, "--top-k", -1), "--top-k -1: expected an integer"),
        ((), "--target-kl"),
    ],
)
def test_what_is_refused_is_refused_before_models_are_loaded(words, message, monkeypatch):
    import guided_decode.cli.calibrate

    monkeypatch.setattr(guided_decode.cli.calibrate, "load_policy", None)
    result = run("calibrate", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_other_policies_need_prompts():
    result = run("calibrate", "--target-kl", 0.1, "--policy", models.saved("llama", "lm"),
                 "--scorer", "tiny-tulu-value")  # fmt: skip
    assert result.exit_code == 2
    assert "no prompts came: pass a file of them" in result.stderr


def test_a_target_below_what_the_candidates_alone_cost_is_refused(prompts):
    file = prompts(tiny_tulu.validation_prompts(4))
    result = run("calibrate", file, "--target-kl", 1e-6, "--top-k", 2, "--max-new-tokens", 20)
    assert result.exit_code == 2
    assert "nats a token from the policy" in result.stderr


def test_an_embedded_policy_is_calibrated_on_prompts_of_its_own_task():
    assert embedded_task("tiny-tulu-ppo") is tiny_tulu
    assert embedded_task("tiny-tulu-lists-sft") is lists
    assert embedded_task("allenai/tulu-2-dpo-7b") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "scorer", "targets"),
    [
        ("tiny-tulu-sft", "tiny-tulu-value", (0.015, 0.022, 0.04)),
        ("tiny-tulu-ppo", "tiny-tulu-value", (0.012, 0.02, 0.03)),
        ("tiny-tulu-lists-sft", "tiny-tulu-reward", (0.05, 0.1, 0.2)),
        pytest.param(
            "tiny-tulu-lists-sft",
            "tiny-tulu-dpo",
            (0.05, 0.1, 0.2),
            marks=pytest.mark.xfail(
                reason="0.05 and 0.1 are met; at 0.2 held-out prompts had 0.167, 16% less"
            ),
        ),
    ],
)
def test_the_divergence_is_the_one_asked_for_on_held_out_prompts(policy, scorer, targets):
    asked = [word for target in targets for word in ("--target-kl", target)]
    result = run("calibrate", "--policy", policy, "--scorer", scorer, *asked,
                 "--max-new-tokens", 80, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    for found in json.loads(result.stdout)["results"]:
        assert found["held_out_kl"] == pytest.approx(found["target_kl"], rel=0.15), found
