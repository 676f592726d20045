"""`guided-decode search` on tiny-tulu: it writes what the library finds and `score` says."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from guided_decode import load_scorer, tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.search_options import MethodOptions
from guided_decode.search import METHODS, ScorerJudge, load_generator, run
from guided_decode.search.answers import final_answer
from guided_decode.search.seeds import derive
from tests import PATIENCE

# Small enough for a test, and of more than one round.
SMALL = {
    "best-of-n": {"n": 3},
    "vote": {"n": 5},
    "weighted-vote": {"n": 4},
    "block": {"width": 2, "branches": 2, "block": 20, "trees": 2, "leave": True, "margin": 0.5},
    "cd": {"branches": 3, "block": 20},
    "vgs": {"width": 2, "block": 20},
    "dvts": {"trees": 2, "branches": 2, "stop": ("c1\n", "c0\n")},
    "chunk-beam": {"width": 2, "branches": 2, "block": 24},
    "value-beam": {"width": 2, "branches": 2, "margin": 0.4},
    "prune-and-refill": {"n": 3, "block": 16, "margin": 0.1},
    "smc": {"particles": 3, "block": 20, "beta": 3.0, "threshold": 0.9, "choice": "best"},
}
PROMPTS = tiny_tulu.held_out_prompts(3)


def invoke(*args, stdin=None):
    return CliRunner().invoke(app, ["search", *map(str, args)], input=stdin)


def search(*args, stdin=None):
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(*args, stdin=None):
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(settings):
    """Settings as they are typed."""
    words = []
    for name, value in settings.items():
        if name == "leave":
            words += ["--leave" if value else "--stay"]
        elif isinstance(value, tuple):
            words += [word for one in value for word in (f"--{name}", one)]
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def agree(one, other):
    """Whether two lines, or parts of them, are the same but for time and rounding."""
    if isinstance(one, dict):
        timed = [name for name in one if name != "seconds"]
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in timed)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


@functools.cache
def policy():
    return load_generator(tiny_tulu.model_path("sft"))


@functools.cache
def judge():
    critic = load_scorer(tiny_tulu.model_path("value"), kind="ppo-critic",
                         policy_tokenizer=tiny_tulu.model_path("sft"))  # fmt: skip
    return ScorerJudge(critic, terminals=policy().eos_token_ids)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"id": i, "prompt": text} for i, text in enumerate(PROMPTS)]
    return write(tmp_path_factory.mktemp("prompts") / "in.jsonl", rows)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_writes_what_the_library_finds(name, prompts):
    lines = search("--method", name, *options(SMALL[name]), "--max-new-tokens", 60, "--seed", 9,
                   prompts)  # fmt: skip
    assert [(line["line"], line["id"], line["prompt"]) for line in lines] == [
        (i + 1, i, text) for i, text in enumerate(PROMPTS)
    ]
    method, generator = METHODS[name], policy()

    def answer(tokens):
        return final_answer(generator.decode(tokens))

    for i, line in enumerate(lines):
        seed = derive(9, i)
        assert (line["method"], line["seed"]) == (name, seed)
        begun = method.begin(
            generator.encode(tiny_tulu.render(PROMPTS[i])), seed=seed, max_tokens=60,
            answer=answer if method.votes else None, **SMALL[name],
        )  # fmt: skip
        found = run(begun, generator, judge())
        assert (line["chosen"], line["stopped"]) == (found.chosen, None)
        assert line["response"] == generator.decode(found.best.tokens)
        assert len(line["candidates"]) == len(found.candidates)
        for written, each in zip(line["candidates"], found.candidates, strict=True):
            text = generator.decode(each.tokens)
            assert (written["response"], written["tokens"]) == (text, len(each.tokens))
            assert written["score"] == pytest.approx(each.score, abs=2e-5)
            assert written["log_prob"] == pytest.approx(each.log_prob, abs=2e-4)
            at_eos = each.tokens[-1] in generator.eos_token_ids
            assert written["finished"] == at_eos
            assert written["ended"] in (("eos",) if at_eos else ("length", "search"))
        spent = found.spent
        cost = {"policy_tokens": spent.policy_tokens, "scorer_tokens": spent.scorer_tokens,
                "generated_tokens": spent.generated, "calls": spent.calls}  # fmt: skip
        assert line["cost"].pop("seconds") > 0
        assert line["cost"] == cost
        assert set(line["details"]) == set(found.details)


def test_best_of_n_chooses_what_score_puts_first(prompts, tmp_path):
    lines = search("--method", "best-of-n", "--n", 4, prompts)
    chats = [
        {"prompt": line["prompt"], "response": each["response"], "chosen_one": i == line["chosen"]}
        for line in lines for i, each in enumerate(line["candidates"])
    ]  # fmt: skip
    output = tmp_path / "scored.jsonl"
    result = CliRunner().invoke(
        app, ["score", str(write(tmp_path / "chats.jsonl", chats)), str(output)]
    )
    assert result.exit_code == 0, result.output
    scored = read(output)
    for i, line in enumerate(lines):
        own = scored[4 * i : 4 * i + 4]
        assert all(each["finished"] for each in line["candidates"])
        values = [each["score"] for each in own]
        assert [each["score"] for each in line["candidates"]] == pytest.approx(values, abs=1e-5)
        assert line["score"] == max(each["score"] for each in line["candidates"])
        assert [each["chosen_one"] for each in own].index(True) == values.index(max(values))


def test_every_setting_has_an_option_and_every_option_a_method():
    known = {name for method in METHODS.values() for name in method.settings}
    assert {field.name for field in fields(MethodOptions)} == known


def test_batches_change_nothing(prompts):
    words = ["--method", "smc", *options(SMALL["smc"]), "--max-new-tokens", 50, prompts]
    one, all_ = (search(*words, "--batch", size) for size in (1, 4))
    assert agree(one, all_)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stops_at_its_budget_and_says_so(name):
    words = ["--method", name, *options(SMALL[name]), "--prompt", PROMPTS[0]]
    limits = [("policy_tokens", 60)]
    limits += [("scorer_tokens", 40)] if METHODS[name].judged else []
    for limit, most in limits:
        (line,) = search(*words, f"--max-{limit.replace('_', '-')}", most)
        assert line["stopped"] == limit
        assert line["cost"][limit] <= most
        assert (
            not line["candidates"]
            or any(
                each["ended"] == "budget" and not each["finished"] for each in line["candidates"]
            )
            or limit == "scorer_tokens"
        )


def test_a_search_that_has_no_time_finds_nothing_and_says_so():
    (line,) = search("--method", "cd", "--prompt", PROMPTS[0], "--max-seconds", 1e-9)
    assert (line["stopped"], line["response"], line["candidates"]) == ("seconds", None, [])
    assert (line["chosen"], line["score"], line["cost"]["policy_tokens"]) == (None, None, 0)


def test_votes_count_the_answers_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "last_digits.py").write_text(
        "def last(text):\n    return text[-1:] or None\n\n"
        "def broken(text):\n    raise RuntimeError('no answer\\nhere')\n\n"
        "def listed(text):\n    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--method", "vote", "--n", 6, "--prompt", PROMPTS[1]]
    (line,) = search(*words, "--answer", "last_digits:last")
    answers = [each["response"][-1] for each in line["candidates"]]
    assert [each["answer"] for each in line["candidates"]] == answers
    assert line["details"]["votes"] == {one: answers.count(one) for one in answers}
    assert line["score"] is None
    assert line["cost"]["scorer_tokens"] == 0
    assert "--answer last_digits:broken failed on a response: RuntimeError: no answer here" in (
        refused(*words, "--answer", "last_digits:broken")
    )
    assert "TypeError: unhashable type: 'list'" in refused(*words, "--answer", "last_digits:listed")
    assert "last_digits has no function first" in refused(*words, "--answer", "last_digits:first")
    assert "no_such_module cannot be imported" in refused(*words, "--answer", "no_such_module:f")
    assert "expected one of final, boxed, number, or MODULE:FUNCTION" in (
        refused(*words, "--answer", "middle")
    )


def test_a_vote_ends_a_block_search_where_an_answer_is_asked_for():
    words = ["--method", "vgs", *options(SMALL["vgs"]), "--prompt", PROMPTS[2]]
    (line,) = search(*words, "--answer", "final")
    sums = {}
    for each in line["candidates"]:
        assert each["answer"] == final_answer(each["response"])
        sums[each["answer"]] = sums.get(each["answer"], 0.0) + each["score"]
    assert line["details"]["votes"] == pytest.approx(sums, abs=1e-5)
    assert line["candidates"][line["chosen"]]["answer"] == max(sums, key=sums.get)


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
        (["--method", "cd", "--max-policy-tokens", "0"], "policy_tokens=0: expected a number"),
        (["--method", "cd", "--raw", "--prompt-format", "tulu-2"], "--raw takes text as it is"),
        (["--method", "cd", "--policy", "nothing"], "nothing: unknown model"),
    ],
)  # fmt: skip
def test_what_makes_no_search_is_refused_in_one_line(words, message):
    assert message in refused(*words, "--prompt", PROMPTS[0])


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
