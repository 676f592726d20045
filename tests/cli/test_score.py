"""`guided-decode score`: right numbers, and nothing finished is ever lost."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from tests import PATIENCE
from tests.models import randomise, scratch


def score(*args):
    result = CliRunner().invoke(app, ["score", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result


def chats(n):
    prompts = tiny_tulu.held_out_prompts(n)
    return [
        {"id": f"sum-{i}", "prompt": p, "response": tiny_tulu.worked_answer(*tiny_tulu.operands(p))}
        for i, p in enumerate(prompts)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_tulu.model_path("value"))


def ids(chat, eos=True):
    text = tiny_tulu.render(chat["prompt"]) + chat["response"]
    own = tokenizer().encode(text, add_special_tokens=False)
    return [*own, tokenizer().eos_token_id] if eos else own


@functools.cache
def reward_model():
    """A random reward model with tiny-tulu's tokenizer."""
    path = scratch() / "reward-model"
    config = LlamaConfig.from_pretrained(tiny_tulu.model_path("sft"), num_labels=1)
    model = LlamaForSequenceClassification(config).eval()
    randomise(model, seed=3)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_critics_score_is_its_value_at_the_last_token_before_eos(tmp_path, batch_size):
    given = chats(7)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    score(source, output, "--batch-size", batch_size)
    critic = AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value"))
    for i, (chat, line) in enumerate(zip(given, read(output), strict=True), start=1):
        value = critic(input_ids=torch.tensor([ids(chat, eos=False)])).logits[0, -1, 0].item()
        assert line["score"] == pytest.approx(value, abs=1e-5)
        assert (line["line"], line["id"]) == (i, chat["id"])


def test_per_token_gives_the_value_of_each_token_of_the_response(tmp_path):
    given = chats(3)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    score(source, output, "--per-token")
    critic = AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value"))
    for chat, line in zip(given, read(output), strict=True):
        whole = ids(chat, eos=False)
        prompt = len(ids({**chat, "response": ""}, eos=False))
        values = critic(input_ids=torch.tensor([whole])).logits[0, prompt:, 0].tolist()
        assert line["values"][:-1] == pytest.approx(values, abs=1e-5)
        assert line["values"][-1] is None
        assert "".join(line["tokens"]) == chat["response"] + "</s>"
        assert line["score"] == line["values"][-2]


@pytest.mark.parametrize("per_token", [False, True])
def test_a_reward_models_score_is_read_at_eos(tmp_path, per_token):
    given = chats(4)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    score(source, output, "--scorer", reward_model(), *["--per-token"] * per_token)
    model = LlamaForSequenceClassification.from_pretrained(reward_model())
    for chat, line in zip(given, read(output), strict=True):
        reward = model(input_ids=torch.tensor([ids(chat)])).logits[0, 0].item()
        assert line["score"] == pytest.approx(reward, abs=1e-4)
        assert ("values" in line) == per_token


def test_an_implicit_rewards_score_is_summed_over_the_response(tmp_path):
    given = chats(3)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    score(source, output, "--scorer", "tiny-tulu-ppo", "--per-token")

    def log_probs(name, chat):
        model = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path(name))
        whole = torch.tensor([ids(chat)])
        own = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
        return own.gather(-1, whole[0, 1:, None])[:, 0]

    for chat, line in zip(given, read(output), strict=True):
        ratios = log_probs("ppo", chat) - log_probs("sft", chat)
        response = ratios[len(ids({**chat, "response": ""}, eos=False)) - 1 :]
        assert line["values"] == pytest.approx(response.tolist(), abs=1e-4)
        assert line["score"] == pytest.approx(response.sum().item(), abs=1e-3)


def test_the_next_run_keeps_finished_lines_and_drops_half_a_line(tmp_path):
    given = chats(9)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    score(source, output)
    whole = output.read_bytes()
    marked = whole.splitlines(keepends=True)
    # A line that was finished is not computed again: a mark in it survives.
    marked[1] = marked[1].replace(b'"line": 2', b'"mark": 1, "line": 2')
    output.write_bytes(b"".join(marked[:5]) + marked[5][:-20])
    score(source, output)
    lines = read(output)
    assert [line["id"] for line in lines] == [chat["id"] for chat in given]
    assert lines[1]["mark"] == 1
    before = [json.loads(line)["score"] for line in whole.splitlines()]
    assert [line["score"] for line in lines] == pytest.approx(before, abs=2e-6)
    done = output.read_bytes()
    score(source, output)
    assert output.read_bytes() == done


def test_lines_of_another_input_or_setting_are_not_mixed_in(tmp_path):
    given = chats(3)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    score(source, output)
    runner = CliRunner()
    other = write(tmp_path / "other.jsonl", [given[0], given[2], given[1]])
    for args in ([source, output, "--per-token"], [other, output],
                 [source, output, "--scorer", "tiny-tulu-ppo"]):  # fmt: skip
        result = runner.invoke(app, ["score", *map(str, args)])
        assert result.exit_code == 2
        assert "made from another input or with other settings" in result.stderr
    # More lines at the end of the input are only more to do.
    write(source, [*given, chats(4)[3]])
    score(source, output)
    assert len(read(output)) == 4
    score(other, output, "--overwrite")
    assert [line["id"] for line in read(output)] == ["sum-0", "sum-2", "sum-1"]


def start(source, output):
    """A run of its own, one chat at a time, that has begun to write."""
    command = [sys.executable, "-m", "guided_decode.cli", "score", source, output,
               "--per-token", "--batch-size", "1"]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE
    while not (output.exists() and output.stat().st_size > 2_000):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_loses_nothing(tmp_path, stop):
    given = chats(300)
    source, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    process = start(source, output)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=PATIENCE)
    kept = output.read_bytes()
    whole = kept[: kept.rindex(b"\n") + 1]
    done = whole.count(b"\n")
    assert 0 < done < len(given), "the run was over before it was stopped"
    if stop is signal.SIGINT:
        assert process.returncode == 130
        assert f"interrupted: {done} of {len(given)} chats" in stderr
        assert "Traceback" not in stderr
    write(source, given[: done + 2])
    score(source, output, "--per-token")
    assert output.read_bytes().startswith(whole)
    assert [line["id"] for line in read(output)] == [chat["id"] for chat in given[: done + 2]]
