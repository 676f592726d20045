"""`guided-decode search` and its files: what it reads, refuses, and goes on from after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.search.seeds import derive
from tests import PATIENCE
from tests.cli.search_runs import (
    PROMPTS,
    SMALL,
    agree,
    invoke,
    options,
    read,
    refused,
    search,
    write,
    write_prompts,
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "in.jsonl")


def test_prompts_come_as_lines_as_text_or_typed(tmp_path):
    words = ["--method", "best-of-n", "--n", 2, "--max-new-tokens", 20]
    row = {"messages": [{"role": "user", "content": PROMPTS[0]}], "score": 5, "id": "a"}
    text = tmp_path / "prompt.txt"
    text.write_text(PROMPTS[0] + "\n")
    piped = search(*words, "-", stdin=json.dumps(row) + "\n")
    for (line,) in (piped, search(*words, text), search(*words, "--prompt", PROMPTS[0])):
        assert line["prompt"] == PROMPTS[0]
        assert [each["response"] for each in line["candidates"]] == [
            each["response"] for each in piped[0]["candidates"]
        ]
    # What the row has is passed on, and never in the place of what was found.
    assert (piped[0]["id"], piped[0]["input"]) == ("a", {"score": 5})
    raw = search(*words, "--raw", "--prompt", tiny_tulu.render(PROMPTS[0]))
    assert raw[0]["response"] == piped[0]["response"]
    turns = [*tiny_tulu.chat_prompts()[1]]
    (line,) = search(*words, "-", stdin=json.dumps(turns) + "\n")
    assert line["prompt"] == turns


def test_a_broken_line_is_refused_by_its_number_or_skipped(tmp_path):
    ended = {"prompt": PROMPTS[0], "response": "10"}
    long = {"prompt": "1" * 5000}
    rows = [{"prompt": PROMPTS[0]}, {"text": 1}, ended, long, {"prompt": PROMPTS[1]}]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = ["--method", "best-of-n", "--n", 2, "--max-new-tokens", 30, source, "--output", output]
    assert "in.jsonl, line 2" in refused(*words)
    assert not output.exists()
    result = invoke(*words, "--on-error", "skip")
    assert result.exit_code == 1
    assert "3 of 5 have no result" in result.stderr
    lines = read(output)
    assert ["error" in line for line in lines] == [False, True, True, True, False]
    assert "the chat ends with an assistant's turn" in lines[2]["error"]
    assert "positions" in lines[3]["error"]
    assert lines[4]["seed"] == derive(0, 4)


def test_another_setting_is_not_mixed_in(prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    words = ["--method", "best-of-n", "--n", 2, "--max-new-tokens", 20, prompts, "--output", output]
    search(*words)
    done = output.read_bytes()
    search(*words, "--batch", 2)
    assert output.read_bytes() == done
    others = (["--n", 3], ["--seed", 1], ["--temperature", 0.5], ["--max-policy-tokens", 500],
              ["--max-new-tokens", 21], ["--policy", "tiny-tulu-ppo"])  # fmt: skip
    for other in others:
        assert "with other settings" in refused(*words, *other)
    search(*words, "--n", 3, "--overwrite")
    assert [len(line["candidates"]) for line in read(output)] == [3] * len(PROMPTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "best"], "--method best: unknown"),
        (["--method", "best-of-n", "--margin", "0.1"],
         "--margin 0.1: best-of-n has no such setting; it has n, temperature, top_p, stop"),
        (["--method", "prune-and-refill"], "prune-and-refill needs --margin, which has no default"),
        (["--method", "cd", "--branches", "0"], "--branches 0: expected an integer"),
        (["--method", "smc", "--choice", "worst"], "--choice worst: expected"),
        (["--method", "vote", "--scorer", "tiny-tulu-value"], "vote, which asks no scorer"),
        (["--method", "smc", "--answer", "final"], "--answer final came with --method smc"),
        (["--method", "cd", "--max-policy-tokens", "0"], "--max-policy-tokens 0: expected a num"),
        (["--method", "cd", "--max-seconds", "-1"], "--max-seconds -1.0: expected a number above"),
        (["--method", "ppo-mcts", "--kl-coef", "0.1"], "--kl-coef 0.1 needs --reference"),
        (["--method", "cards"], "cards needs --target, which has no default"),
        (["--method", "cd", "--raw", "--prompt-format", "tulu-2"], "--raw takes text as it is"),
        (["--method", "cd", "--policy", "nothing"], "nothing: unknown model"),
    ],
)  # fmt: skip
def test_what_makes_no_search_is_refused_in_one_line(words, message):
    assert message in refused(*words, "--prompt", PROMPTS[0])


def test_a_line_that_is_no_prompt_says_what_was_meant(tmp_path):
    given = tmp_path / "typo.jsonl"
    given.write_text('{"promt": "1+1"}\n')
    said = refused("--method", "cd", given)
    assert "expected an object with messages or prompt (did you mean prompt by promt?)" in said
    result = CliRunner().invoke(app, ["search", "--method", "cd", "-"], input="What is 1+1?\n")
    assert result.exit_code == 2
    assert "not JSON" in result.stderr
    assert "plain text is given by a file or --prompt" in " ".join(result.stderr.split())


def test_a_budget_that_no_response_fits_is_said():
    words = ["search", "--method", "best-of-n", "--n", "2", "--prompt", PROMPTS[0]]
    result = CliRunner().invoke(app, [*words, "--max-policy-tokens", "5"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["response"] is None
    said = " ".join(result.stderr.split())
    assert "--prompt has no response: --max-policy-tokens was spent before one was begun" in said
    assert "are done in" not in said


def test_prompts_are_needed_once(prompts):
    assert "expected prompts: pass a file" in refused("--method", "cd")
    assert "--prompt and" in refused("--method", "cd", "--prompt", "1+1", prompts)


def start(source, output):
    """A run of its own, one prompt at a time, that has begun to write."""
    command = [sys.executable, "-m", "guided_decode.cli", "search", "--method", "smc", "--batch",
               "1", *options(SMALL["smc"]), str(source), "--output", str(output)]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_run_that_is_killed_goes_on_to_the_uninterrupted_file(tmp_path):
    rows = [{"prompt": text} for text in tiny_tulu.held_out_prompts(200)]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    process = start(source, output)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    kept = output.read_bytes()
    whole = kept[: kept.rindex(b"\n") + 1]
    done = whole.count(b"\n")
    assert 2 <= done < len(rows), "the run was over before it was stopped"
    # Half a line, as a kill may leave it.
    output.write_bytes(whole + b'{"line": 3, "prom')
    write(source, rows[: done + 3])
    words = ["--method", "smc", *options(SMALL["smc"]), source, "--output"]
    search(*words, output, "--batch", 2)
    assert output.read_bytes().startswith(whole)
    search(*words, tmp_path / "uninterrupted.jsonl")
    assert agree(read(output), read(tmp_path / "uninterrupted.jsonl"))
