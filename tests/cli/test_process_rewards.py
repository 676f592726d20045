"""Process reward models on the command line: they judge steps, and guide no tokens."""

import json
import math
import shutil

import pytest
from typer.testing import CliRunner

from guided_decode import load_scorer
from guided_decode.checkpoints.prompts import render
from guided_decode.cli.app import app
from tests.look_alikes import look_alike

QWEN = "Qwen/Qwen2.5-Math-PRM-7B"
SHEPHERD = "peiyi9979/math-shepherd-mistral-7b-prm"
POLICY = "Qwen/Qwen2.5-Math-7B-Instruct"


def invoke(*args, code=0):
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.mark.parametrize(
    ("name", "prompt_format", "separator", "aggregate"),
    [(QWEN, "qwen-2.5-math", "\n\n", math.prod), (SHEPHERD, "math-shepherd", "\n", min)],
)
def test_score_reads_each_step_in_the_checkpoints_own_format(
    name, prompt_format, separator, aggregate, tmp_path
):
    response = separator.join(["Two and two.", "That is 4."])
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "What is 2+2?", "response": response}) + "\n")
    out = invoke("score", chats, "-", "--scorer", look_alike(name), "--per-token").stdout
    line = json.loads(out)
    prompt = render([{"role": "user", "content": "What is 2+2?"}], prompt_format,
                    add_generation_prompt=True)  # fmt: skip
    (rewards,) = load_scorer(look_alike(name)).step_rewards([prompt], [response])
    assert line["values"] == pytest.approx(rewards, abs=1e-5)
    assert line["score"] == pytest.approx(aggregate(rewards), abs=1e-5)
    out = invoke("score", chats, "-", "--scorer", look_alike(name), "--aggregate", "last").stdout
    assert json.loads(out)["score"] == pytest.approx(rewards[-1], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "prompt_format"), [(QWEN, "qwen-2.5-math"), (SHEPHERD, "math-shepherd")]
)
def test_search_judges_blocks_by_steps_whatever_the_policy_reads(name, prompt_format):
    """The second one has another tokenizer and another format than the policy."""
    words = ["--method", "dvts", "--trees", "2", "--branches", "2", "--block", "5",
             "--max-new-tokens", "10", "--prompt", "What is 2+2?"]  # fmt: skip
    out = invoke("search", *words, "--policy", look_alike(POLICY), "--scorer", look_alike(name),
                 "--prompt-format", "qwen-2.5-math").stdout  # fmt: skip
    found = json.loads(out)
    scorer = load_scorer(look_alike(name))
    prompt = render([{"role": "user", "content": "What is 2+2?"}], prompt_format,
                    add_generation_prompt=True)  # fmt: skip
    for each in found["candidates"]:
        assert each["score"] == pytest.approx(
            scorer.values([prompt], [each["response"]])[0], abs=1e-5
        )
    assert found["score"] == max(each["score"] for each in found["candidates"])


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--policy", POLICY, "--scorer", QWEN, "--prompt", "Hi"],
        ["scorer", QWEN],
    ],
)
def test_tokens_are_refused_with_the_reason(words):
    words = [look_alike(word) if "/" in word else word for word in words]
    said = " ".join(invoke(*words, code=2).stderr.split())
    assert "is read at the marks that end a response's steps" in said


def test_search_refuses_raw_text():
    said = invoke("search", "--method", "dvts", "--raw", "--prompt", "2+2", "--policy",
                  look_alike(POLICY), "--scorer", look_alike(QWEN), code=2).stderr  # fmt: skip
    assert "reads chats as text in its own format: drop it" in " ".join(said.split())


def test_one_without_a_template_is_read_in_the_format_that_was_named(tmp_path):
    folder = tmp_path / "my-prm"
    shutil.copytree(look_alike(QWEN), folder)
    (folder / "chat_template.jinja").unlink()
    words = ["search", "--method", "best-of-n", "--n", "2", "--max-new-tokens", "4", "--prompt",
             "What is 2+2?", "--policy", look_alike(POLICY), "--scorer", folder]  # fmt: skip
    said = invoke(*words, code=2).stderr
    assert "its tokenizer has no chat template: pass --judge-format" in " ".join(said.split())
    found = json.loads(invoke(*words, "--judge-format", "math-shepherd").stdout)
    (best,) = (each for i, each in enumerate(found["candidates"]) if i == found["chosen"])
    # Of a response that is cut inside a character, its beginning was read.
    read = [best["response"].removesuffix("\ufffd" * i) for i in range(3)]
    values = load_scorer(folder).values(["What is 2+2? "] * 3, read)
    assert found["score"] in [pytest.approx(value, abs=1e-5) for value in values]
    other = json.loads(invoke(*words, "--judge-format", "qwen-2.5-math").stdout)
    assert found["run"] != other["run"]
    # Of a scorer that reads token ids it says nothing, which shows when it is there.
    said = invoke("search", "--method", "best-of-n", "--prompt", "2+2", "--judge-format", "tulu-2",
                  "--policy", look_alike(POLICY), "--scorer",
                  look_alike("Open-Reasoner-Zero-Critic-0.5B"), code=2).stderr  # fmt: skip
    assert "--judge-format is the scorer's chat format through text" in " ".join(said.split())


def test_methods_that_value_single_tokens_are_refused():
    said = invoke("search", "--method", "value-beam", "--prompt", "2+2", "--policy",
                  look_alike(POLICY), "--scorer", look_alike(QWEN), code=2).stderr  # fmt: skip
    assert "single tokens" in " ".join(said.split())


def test_a_plan_judges_by_steps():
    out = invoke("plan", POLICY, QWEN, "--gpu", "H100").stdout
    (command,) = [line for line in out.splitlines() if line.startswith("  guided-decode")]
    assert f"search --method dvts --policy {POLICY} --scorer {QWEN}" in command


def test_models_are_listed_by_group_and_say_what_is_inferred(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = invoke("models").stdout
    groups = ["Tulu", "Contextual AI", "Open-Reasoner-Zero", "Value-guided search",
              "Process reward models", "Reward models", "tiny-tulu", "smol"]  # fmt: skip
    rows = [line.strip() for line in text.splitlines()]
    assert [row for row in rows if row in groups] == groups
    assert "read at the end of each step · steps are multiplied" in text
    lines = {line["name"]: line for line in json.loads(invoke("models", "--json").stdout)}
    assert lines[QWEN]["steps"] == "extra-0"
    assert lines[QWEN]["aggregate"] == "product"
    assert "151651" in lines[QWEN]["inferred"][0]
    assert lines["Skywork/Skywork-Reward-V2-Qwen3-8B"]["turn_end"] == "\n"
    assert "</answer>" in lines["Open-Reasoner-Zero/Open-Reasoner-Zero-7B"]["stop"]
