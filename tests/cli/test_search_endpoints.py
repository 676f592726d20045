"""`guided-decode search --endpoint`: servers that answer, fail, die, and come back."""

import os
import signal
import subprocess
import sys
import time

import pytest

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import METHODS, ScorerJudge, connect_generator, load_generator, run
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
from tests.search.recordings import Live
from tests.search.servers.completion_server import Bad, CompletionServer

MODELS = ["--policy", "tiny-tulu-sft"]
HASTY = ["--endpoint-retries", 1, "--endpoint-timeout", PATIENCE]


@pytest.fixture(scope="module")
def local():
    return load_generator(tiny_tulu.model_path("sft"))


@pytest.fixture
def server(local):
    model, tokenizer = Live(local), local._tokenizer
    with CompletionServer(model, tokenizer, max_logprobs=-1).running() as server:
        yield server


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "in.jsonl")


@pytest.mark.parametrize("name", ["smc", "cards", "vote"])
def test_it_writes_what_the_library_finds_on_servers(name, server, local, prompts):
    with CompletionServer(server.model, local._tokenizer, max_logprobs=-1).running() as second:
        both = ["--endpoint", server.url, "--endpoint", second.url]
        lines = search("--method", name, *options(SMALL[name]), "--max-new-tokens", 24, *MODELS,
                       *both, prompts)  # fmt: skip
        assert min(len(server.asked()), len(second.asked())) > 9
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    judge = ScorerJudge(critic, terminals=local.eos_token_ids)
    with connect_generator(server.url, tokenizer=local._tokenizer) as remote:
        for i, line in enumerate(lines):
            begun = METHODS[name].begin(
                local.encode(tiny_tulu.render(PROMPTS[i])), seed=derive(0, i), max_tokens=24,
                answer=(lambda tokens: None) if METHODS[name].votes else None, **SMALL[name],
            )  # fmt: skip
            found = run(begun, remote, judge)
            assert [each["response"] for each in line["candidates"]] == [
                local.decode(each.tokens) for each in found.candidates
            ]
            assert name == "vote" or line["chosen"] == found.chosen


def test_without_chance_a_server_writes_what_this_machine_does(server, prompts):
    words = ["--method", "best-of-n", "--n", 2, "--temperature", 0, "--max-new-tokens", 30, *MODELS,
             prompts]  # fmt: skip
    there, here = search(*words, "--endpoint", server.url), search(*words)
    for line in (*there, *here):
        line.pop("run")
    assert agree(there, here)


def best_of_n(server, prompts, output, *more):
    return ["--method", "best-of-n", "--n", 3, "--max-new-tokens", 24, *MODELS, "--endpoint",
            server.url, prompts, "--output", output, *HASTY, *more]  # fmt: skip


def test_a_server_that_dies_ends_the_run_and_what_is_finished_stays(
    server, local, prompts, tmp_path
):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    search(*best_of_n(server, prompts, whole))
    server.asked()
    third = local.encode(tiny_tulu.render(PROMPTS[2]))
    # The third prompt of the batch has no answer; the others' searches come to their end.
    server.behave = lambda number, body: (
        Bad(status=500, text="out of memory") if body["prompt"] == third else None
    )
    said = refused(*best_of_n(server, prompts, output, "--batch", 1))
    assert "the last of 2 attempts" in said
    assert f"{server.url}/v1/completions answered 500 (out of memory)" in said
    assert agree(read(output), read(whole)[:2])
    server.behave = lambda number, body: None
    # Another address of the same model, waited for otherwise.
    with CompletionServer(server.model, local._tokenizer).running() as other:
        search(*best_of_n(other, prompts, output, "--endpoint-concurrency", 2))
    assert agree(read(output), read(whole))


def lockstep(server, tmp_path, order):
    """A batch of three prompts, of which PROMPTS[1] needs a round less than the others."""
    prompts = write(tmp_path / "in.jsonl", [{"prompt": PROMPTS[i]} for i in order])
    words = ["--method", "cd", "--branches", 2, "--block", 24, "--max-new-tokens", 72, *MODELS,
             "--endpoint", server.url, prompts, "--batch", 3, *HASTY, "--output"]  # fmt: skip
    search(*words, tmp_path / "whole.jsonl")
    lines = read(tmp_path / "whole.jsonl")
    assert [line["details"]["rounds"] for line in lines] == [2 if i == 1 else 3 for i in order]
    server.asked()
    return words, lines


# Four requests ask what the server can do; a round has two for each of three prompts.
TWO_ROUNDS = 4 + 2 * 6


def test_of_a_batch_that_is_broken_off_the_first_that_ended_are_written(server, tmp_path):
    words, lines = lockstep(server, tmp_path, (1, 0, 2))
    output = tmp_path / "out.jsonl"
    server.behave = lambda number, body: Bad(cut=True) if number > TWO_ROUNDS else None
    assert "the last of 2 attempts" in refused(*words, output)
    assert agree(read(output), lines[:1])
    server.behave = lambda number, body: None
    search(*words, output)
    assert agree(read(output), lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl", "out.jsonl", "whole.jsonl",
    ]  # fmt: skip


def test_what_ended_before_its_turn_is_not_searched_again(server, tmp_path):
    words, lines = lockstep(server, tmp_path, (0, 1, 2))
    output, ahead = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ahead"
    server.behave = lambda number, body: Bad(cut=True) if number > TWO_ROUNDS else None
    refused(*words, output)
    assert not output.exists()
    assert agree(read(ahead), lines[1:2])
    # Half a line of a kill, and one of another run, which do not count.
    whole = ahead.read_bytes()
    other = whole.replace(lines[1]["run"].encode(), b"0" * 16).replace(b'"line": 2', b'"line": 3')
    ahead.write_bytes(whole + other + whole[:-9])
    server.asked()
    server.behave = lambda number, body: None
    search(*words, output)
    assert agree(read(output), lines)
    assert len(server.asked()) == 4 + 2 * 2 * 3, "two searches of three rounds"
    assert not ahead.exists()


def test_a_run_that_is_killed_goes_on_to_the_uninterrupted_file(server, tmp_path):
    rows = [{"prompt": text} for text in tiny_tulu.held_out_prompts(60)]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = [str(word) for word in best_of_n(server, source, output, "--batch", 1)]
    process = subprocess.Popen(
        [sys.executable, "-m", "guided_decode.cli", "search", *words], stderr=subprocess.PIPE,
        text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    done = output.read_bytes().count(b"\n")
    assert 2 <= done < len(rows), "the run was over before it was stopped"
    write(source, rows[: done + 2])
    search(*best_of_n(server, source, output, "--batch", 2))
    search(*best_of_n(server, source, tmp_path / "whole.jsonl"))
    assert agree(read(output), read(tmp_path / "whole.jsonl"))


def test_an_interrupt_takes_back_what_is_under_way(server, prompts, tmp_path):
    hanging = {}

    def behave(number, body):
        hanging[number] = True
        return Bad(after=PATIENCE) if number > 7 else None

    server.behave = behave
    words = [str(word) for word in best_of_n(server, prompts, tmp_path / "out.jsonl", "--batch", 1)]
    process = subprocess.Popen(
        [sys.executable, "-m", "guided_decode.cli", "search", *words],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while max(hanging, default=0) < 8:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE / 2)
    assert process.returncode == 130, said
    assert "interrupted: 1 of 3 prompts are done" in said
    assert "the same command goes on from there" in said


def test_another_served_model_is_not_mixed_in(server, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    search(*best_of_n(server, prompts, output))
    server.names = ["policy", "adapter"]
    said = refused(*best_of_n(server, prompts, output))
    assert f"{server.url} serves policy, adapter: pass --served-model, one of them" in said
    search(*best_of_n(server, prompts, output, "--served-model", "policy"))
    assert "with other settings" in refused(
        *best_of_n(server, prompts, output, "--served-model", "adapter")
    )
    assert "and not third" in refused(
        *best_of_n(server, prompts, output, "--served-model", "third")
    )


def test_the_key_comes_from_the_environment_and_is_nowhere_else(
    server, prompts, tmp_path, monkeypatch
):
    server.key, output = "sk-secret", tmp_path / "out.jsonl"
    words = best_of_n(server, prompts, output, "--api-key-env", "POLICY_KEY")
    assert "POLICY_KEY is not set: expected the server's API key in it" in refused(*words)
    monkeypatch.setenv("POLICY_KEY", "sk-wrong")
    said = refused(*words)
    assert "answered 401" in said
    assert "sk-wrong" not in said
    monkeypatch.setenv("POLICY_KEY", "sk-secret")
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "sk-secret" not in result.output + output.read_text()


ENDPOINT = ["--endpoint", "http://127.0.0.1:1", *HASTY]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cd", *ENDPOINT], "--endpoint needs --policy, a folder or Hub id that has the tokenizer"),
        (["cd", *ENDPOINT, *MODELS, "--engine", "vllm"], "--engine vllm came with --endpoint"),
        (["cd", "--served-model", "x"], "--served-model came without --endpoint"),
        (["cd", "--endpoint-retries", 3], "--endpoint-retries came without --endpoint"),
        (["cd", "--engine", "server"], "--engine server: expected local or vllm"),
        (["cd", "--engine-args", "{}"], "--engine-args came without --engine vllm"),
        (["ppo-mcts", "--kl-coef", 0.1, *ENDPOINT, *MODELS, "--reference", "tiny-tulu-sft"],
         "--kl-coef 0.1 compares the policy with a reference, which --endpoint does not have"),
        (["cd", "--endpoint", "127.0.0.1:1", *MODELS], "'127.0.0.1:1' is no URL of a server"),
        (["cd", *ENDPOINT, *MODELS], "http://127.0.0.1:1/v1/models cannot be reached"),
        (["cd", "--engine", "vllm", "--engine-args", "[1]"], "expected a JSON object"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(words, message):
    assert message in refused("--method", *words, "--prompt", PROMPTS[0])


def test_what_a_server_cannot_tell_is_refused_with_what_to_do(local, prompts):
    with CompletionServer(Live(local), local._tokenizer).running() as server:
        words = ["--method", "cards", *options(SMALL["cards"]), *MODELS, "--endpoint", server.url]
        said = refused(*words, prompts)
    assert "start vLLM with --max-logprobs -1: this method needs whole distributions" in said
