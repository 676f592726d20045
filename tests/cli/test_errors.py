"""Bad input ends a command with one line on stderr and exit code 2, and no traceback."""

import json
import re

import pytest
from typer.testing import CliRunner

from guided_decode.cli.app import app
from tests import models

GOOD = json.dumps({"prompt": "2+2?", "response": "4"})


def run(*args, stdin=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--beta", "much"], r"--beta"),
        (["--frobnicate"], r"No such option: --frobnicate"),
        (["--policy", "tiny-tulu-sfx"], r"tiny-tulu-sfx: unknown model .*tiny-tulu-sft"),
        (["--scorer", "/no/such/critic"], r"/no/such/critic: no such folder"),
        (["--kind", "oracle"], r"kind 'oracle': expected one of ppo-critic"),
        (["--rule", "raise"], r"--rule raise: expected one of 'reweight', 'prune'"),
        (["--margin", "0.5"], r"--margin 0.5 was given with --rule reweight"),
        (["--beta", "nan"], r"--beta nan: expected a finite number"),
        (["--top-k", "0"], r"--top-k 0 was given with CriticScorer"),
        (["--num-samples", "4"], r"greedy decoding gives one answer 4 times"),
        (["--temperature", "-1"], r"--temperature -1: expected 0 \(greedy\) or more"),
        (["--max-new-tokens", "0"], r"expected at least 1"),
        (["--stream", "--json"], r"--stream prints one answer as text"),
        (["--dtype", "int8"], r"--dtype int8: expected one of auto"),
        (["--device", "abacus"], r"--device abacus cannot be used"),
    ],
)
def test_generate_refuses(args, message):
    refused(run("generate", "--prompt", "2+2?", *args), message)


def test_a_prompt_beyond_the_critics_positions_is_refused():
    refused(run("generate", "--prompt", "4" * 520), "needs 5.. positions .* has 512")


def test_prompts_come_from_one_place(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(run("generate", "--prompt", "a", "--file", "b"), "both given")
    refused(run("generate", "--file", empty), "empty.txt holds no prompt")
    refused(run("generate", stdin=""), "stdin holds no prompt")
    refused(run("generate", "--file", tmp_path / "none.txt"), "none.txt: No such file")
    empty.write_bytes(b"\xff\xfe")
    refused(run("generate", "--file", empty), "not UTF-8")


def test_a_policy_without_a_known_scorer_asks_for_one(tmp_path):
    refused(run("generate", "--prompt", "a", "--policy", tmp_path), "paired with no scorer")
    refused(run("generate", "--prompt", "a", "--scorer", tmp_path), "paired with no policy")


def test_a_scorer_of_another_vocabulary_is_refused():
    critic = models.saved("llama", "token")
    result = run("generate", "--prompt", "a", "--policy", "tiny-tulu-sft", "--scorer", critic,
                 "--kind", "ppo-critic")  # fmt: skip
    refused(result, "vocabulary|tokeni[sz]er")


def test_a_policy_that_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{ not json")
    result = run("generate", "--prompt", "a", "--policy", tmp_path, "--scorer", "tiny-tulu-value")
    refused(result, f"cannot load policy {tmp_path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 3: not JSON"),
        ('"text"', r"line 3: 'text': expected an object with messages"),
        ("[]", r"line 3: \[\]: expected an object with messages"),
        ('{"prompt": "a"}', r"line 3: expected a chat that ends with an assistant's response"),
        ('{"prompt": 3, "response": "b"}', r"line 3: message 0 has the content 3"),
        ('{"messages": [{"role": "bard", "content": "x"}]}', r"line 3: .*the role 'bard'"),
        ('{"messages": ["hello"]}', r"line 3: message 0 has the role 'hello'"),
    ],
)
def test_score_names_the_line_before_it_scores_anything(tmp_path, line, message):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    refused(run("score", source, output), message)
    assert not output.exists()


def test_score_keeps_what_comes_before_a_chat_that_does_not_fit(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    long = json.dumps({"prompt": "2+2?", "response": "4" * 600})
    source.write_text(f"{GOOD}\n{GOOD}\n{long}\n")
    refused(run("score", source, output), "line 3 cannot be scored: .*positions")
    assert len(output.read_text().splitlines()) == 2


def test_score_leaves_files_alone_that_it_did_not_write(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(GOOD + "\n")
    refused(run("score", source, source), "is the input")
    output.write_text("something else\n")
    refused(run("score", source, output), "out.jsonl, line 1: no line of this command's output")
    assert output.read_text() == "something else\n"
    refused(run("score", tmp_path / "none.jsonl", output), "none.jsonl: No such file")
    refused(run("score", source, tmp_path / "no" / "out"), "No such file")


def test_demo_refuses_before_it_works(tmp_path, monkeypatch):
    refused(run("demo", "--prompts", "0"), "--prompts")
    refused(run("demo", "--plot", tmp_path / "no" / "p.png"), "no such folder")
    refused(run("demo", "--plot", tmp_path / "p.png", "--no-plot"), "both given")
    refused(run("demo", "--plot", tmp_path), "is a folder: expected a file")
    refused(run("demo", "--plot", tmp_path / "p.mp4"), "p.mp4: expected .* ends in one of .*png")
    refused(run("demo", "--seed", 2**64), "--seed")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    refused(run("demo", "--plot", tmp_path / "p.png"), r"pip install 'guided-decode\[plots\]'")
