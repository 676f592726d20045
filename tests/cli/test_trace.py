"""`guided-decode trace`: pages of decoded prompts, of responses that are there, of searches."""

import json
import re

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.token_texts import next_texts
from tests import models

QUESTION = "What is 4785 + 5426?"
WORDS = ("--prompt", QUESTION)


def run(*words, code=0, **options):
    result = CliRunner().invoke(app, list(map(str, words)), **options)
    assert result.exit_code == code, result.output
    return result


def data_of(page):
    return json.loads(re.search(r'id="trace">(.*?)</script>', page)[1])


def traced(source, tmp_path, *words):
    """The data of the page of some lines, and what was said on stderr."""
    file = source
    if isinstance(source, list):
        file = tmp_path / "in.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in source))
    result = run("trace", file, "--output", tmp_path / "page.html", *words)
    return data_of((tmp_path / "page.html").read_text()), result.stderr


def path(data, run_index, prompt=0):
    """Of each token of a run: its numbers, and those of its step."""
    own = data["prompts"][prompt]
    return [
        (*own["steps"][step][2][row], own["steps"][step][0], outside, after)
        for step, row, outside, after in own["runs"][run_index]["path"]
    ]


@pytest.fixture(scope="module")
def page():
    return run("trace", *WORDS, "--output", "-").stdout


@pytest.fixture(scope="module")
def comparison():
    return json.loads(run("generate", *WORDS, "--compare", "--json").stdout)


def test_plain_and_guided_are_those_of_generate(page, comparison):
    data = data_of(page)
    assert (data["policy"], data["scorer"]) == ("tiny-tulu-sft", "tiny-tulu-value")
    assert data["guidance"]["top_k"] == 4
    assert data["decoding"] == {"temperature": 0.0, "seed": 0, "max_new_tokens": 256}
    (prompt,) = data["prompts"]
    assert (prompt["method"], prompt["messages"]) == (None, [["user", QUESTION]])
    assert [(each["name"], each["guided"]) for each in prompt["runs"]] == [
        ("plain", False), ("guided", True)]  # fmt: skip
    for i, each in enumerate(prompt["runs"]):
        told = comparison[each["name"]]
        assert each["pieces"][:-1] == told["tokens"][:-1]
        assert each["pieces"][-1] == "</s>"
        cost = {name: each["facts"][name] for name in ("policy_tokens", "scorer_tokens")}
        assert cost | {"seconds": told["cost"]["seconds"]} == told["cost"]
        for (place, *_, baseline, _, after), value, text in zip(
            path(data, i), told["values"], each["pieces"], strict=True
        ):
            assert data["tokens"][place][1] == text
            assert isinstance(baseline, float)
            if value is not None:
                assert after == pytest.approx(value, abs=1e-5)


def test_each_token_is_the_likeliest_of_its_own_distribution(page):
    """Greedy decoding: of the policy's probabilities, and of the guided ones."""
    data = data_of(page)
    for i, column in ((0, 1), (1, 2)):
        own = data["prompts"][0]
        for step, row, outside, _ in own["runs"][i]["path"]:
            rows = own["steps"][step][2]
            assert not outside
            assert rows[row][column] == max(each[column] for each in rows)


def test_the_same_command_writes_the_same_bytes():
    drawn = ("--temperature", 1, "--seed", 5, "--max-new-tokens", 6)
    first, second = (run("trace", *WORDS, *drawn, "--output", "-") for _ in range(2))
    assert first.stdout == second.stdout
    assert first.stderr == ""


def test_a_file_says_where_it_is(tmp_path):
    out = tmp_path / "x.html"
    result = run("trace", *WORDS, "--max-new-tokens", 3, "--output", out)
    assert result.stdout == ""
    assert result.stderr == f"the page is {out}: open it in a browser\n"
    assert len(data_of(out.read_text())["prompts"][0]["runs"][0]["path"]) == 3


def test_a_head_on_the_policy_and_settings_of_a_file(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("guidance: {beta: 3.5, top_k: 2}\ntrace: {max_new_tokens: 3}\n")
    head = tiny_tulu.trunk_head_path("sft")
    page = run("trace", *WORDS, "--head", head, "--config", settings, "--output", "-").stdout
    data = data_of(page)
    assert (data["policy"], data["scorer"]) == ("tiny-tulu-sft", "tiny-tulu-sft")
    assert (data["guidance"]["beta"], data["guidance"]["top_k"]) == (3.5, 2)
    assert [len(step[2]) for step in data["prompts"][0]["steps"]] == [2, 2, 2]


def test_what_cannot_be_scored_is_refused_by_its_place(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "1+1? " * 200, "response": "2"}) + "\n")
    said = run("trace", file, "--output", tmp_path / "x.html", code=2).stderr
    assert re.search(r"in.jsonl, line 1: .* positions but tiny-tulu-value has 512", said)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "best-of-n", "--n", 3, "--seed", 3),
        pytest.param(("--method", "value-beam", "--width", 2), marks=pytest.mark.slow),
    ],
)
def test_a_search_is_shown_with_all_its_responses(tmp_path, words):
    found = tmp_path / "found.jsonl"
    run("search", *WORDS, *words, "--output", found)
    line = json.loads(found.read_text())
    data, said = traced(found, tmp_path)
    assert "warning" not in said
    assert data["decoding"] == {}
    (prompt,) = data["prompts"]
    assert (prompt["method"], prompt["chosen"]) == (words[1], line["chosen"])
    for i, (own, candidate) in enumerate(zip(prompt["runs"], line["candidates"], strict=True)):
        assert "".join(own["pieces"]) == candidate["response"] + "</s>"
        assert own["facts"] == {name: candidate.get(name) for name in own["facts"]}
        assert own["facts"].keys() == {"score", "log_prob", "ended", "answer"}
        # The judge's score at the end is the last value.
        assert path(data, i)[-1][-1] == pytest.approx(candidate["score"], abs=1e-5)
    assert sorted(run for branch in prompt["branches"] for run in branch[4]) == [
        *range(len(line["candidates"]))
    ]


def test_a_tree_search_has_the_visits_of_each_token(tmp_path):
    found = tmp_path / "found.jsonl"
    run("search", *WORDS, "--method", "ppo-mcts", "--max-new-tokens", 6, "--output", found)
    line = json.loads(found.read_text())
    data, said = traced(found, tmp_path, "--top-k", 10)
    assert "warning" not in said
    (own,) = data["prompts"][0]["runs"]
    for (step, *_), visits, told in zip(
        own["path"], own["visits"], line["details"]["visits"], strict=True
    ):
        rows = data["prompts"][0]["steps"][step][2]
        assert {str(data["tokens"][rows[row][0]][0]): n for row, n in visits} == told


def test_visits_of_other_tokens_are_left_out_and_said_to_be(tmp_path):
    line = {"prompt": QUESTION, "method": "ppo-mcts", "chosen": 0, "candidates": [
        {"response": "5+6", "ended": "length", "tokens": 4}],
        "details": {"visits": [{"7": 3}]}}  # fmt: skip
    data, said = traced([line], tmp_path)
    assert "response 1 had 4 tokens, and its text has 3 in this policy's" in said
    assert "the visits of its search are those of other tokens: they are left out" in said
    assert data["prompts"][0]["runs"][0]["visits"] == []


def test_lines_of_generate_and_others_responses_are_looked_at_as_they_are(tmp_path, comparison):
    short = ("--max-new-tokens", 9)
    one = json.loads(run("generate", *WORDS, "--json", *short).stdout)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    ids = tokenizer("5+6+0=11", add_special_tokens=False).input_ids
    lines = [
        comparison,
        one,
        {"prompt": QUESTION, "response": "Never <b> said"},
        {"prompt": QUESTION, "response_ids": ids},
        {"prompt": QUESTION, "chosen": "5+6", "rejected": "6+5"},
        {"messages": [{"role": "user", "content": QUESTION}]},
    ]
    data, said = traced(lines, tmp_path, *short)
    assert "warning" not in said
    shown = [[(each["name"], each["guided"], "".join(each["pieces"])) for each in prompt["runs"]]
             for prompt in data["prompts"]]  # fmt: skip
    plain, guided = (comparison[name]["text"] + "</s>" for name in ("plain", "guided"))
    assert guided.startswith(one["text"])
    assert shown == [
        [("plain", False, plain), ("guided", True, guided)],
        [("guided", True, one["text"])],
        [("response", False, "Never <b> said</s>")],
        [("response", False, "5+6+0=11")],
        [("chosen", False, "5+6</s>"), ("rejected", False, "6+5</s>")],
        [("plain", False, one["text"]), ("guided", True, one["text"])],
    ]
    assert [prompt["name"] for prompt in data["prompts"]] == [f"line {i}" for i in range(1, 7)]
    # What the policy would not have said is no candidate, and has a value all the same.
    outside = [each for each in path(data, 0, prompt=2) if each[-2]]
    assert outside
    for _, probability, guided_probability, value, advantage, _, _, after in outside:
        assert probability < 0.5
        assert (guided_probability, value, advantage) == (0.0, None, None)
        assert after is not None


def test_lines_are_chosen_by_number_and_limited(tmp_path):
    lines = [{"prompt": QUESTION, "response": text} for text in "1234"]
    for words, expected in (
        (("--limit", 2), ["line 1", "line 2"]),
        (("--line", 4, "--line", 2), ["line 2", "line 4"]),
    ):
        data, _ = traced(lines, tmp_path, *words)
        assert [prompt["name"] for prompt in data["prompts"]] == expected


def test_an_implicit_reward_sums_its_tokens(tmp_path):
    data, _ = traced(
        [{"prompt": QUESTION, "response": "5+6"}], tmp_path, "--policy", "tiny-tulu-sft",
        "--scorer", tiny_tulu.model_path("ppo"), "--kind", "implicit",
        "--reference", tiny_tulu.model_path("sft"), "--top-k", 0,
    )  # fmt: skip
    assert data["summed"]
    assert data["guidance"]["top_k"] == "all"
    total = 0.0
    for _, _, _, value, advantage, baseline, outside, after in path(data, 0):
        assert (outside, baseline) == (0, 0.0)
        assert advantage == pytest.approx(value, abs=1e-5)
        total += value
        assert after == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected a prompt: pass a file, - for stdin, or --prompt TEXT"),
        ((*WORDS, "--line", 2), "--line 2 came without a file of lines"),
        ((*WORDS, "--output", "no/folder/x.html"), "--output no/folder/x.html: no such folder"),
        ((*WORDS, "--output", "."), "--output . is a folder: expected a file, such as trace.html"),
        ((*WORDS, "--top-k", -1), "--top-k -1: expected an integer"),
        ((*WORDS, "--tp-plan", "auto"), "--tp-plan came, and trace decodes in one process"),
        ((*WORDS, "--temperature", -1), "--temperature -1: expected 0"),
    ],
)
def test_what_is_refused_is_refused_before_models_are_loaded(words, message, monkeypatch):
    import guided_decode.cli.trace

    monkeypatch.setattr(guided_decode.cli.trace, "load_policy", None)
    assert message in run("trace", *words, code=2).stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"error": "out of memory", "prompt": "x"}, "no response, but an error: out of memory"),
        ({"method": "cd", "candidates": [], "prompt": "x"}, "the search found no response"),
        ({"method": "cd", "candidates": [7], "prompt": "x"}, "candidate 0 is '7': expected what"),
        ({"method": "cd", "candidates": [{}], "prompt": "x"}, "a response is 'None': expected"),
        ({"method": "cd", "candidates": [{"response": "a"}], "prompt": "x", "chosen": 1},
         "chosen is 1: expected one of 1 candidates, from 0"),
        ({"response": "x"}, "{'response': 'x'}: expected an object with messages or prompt"),
        ({"prompt": 7}, "message 0 has the content 7: expected text"),
    ],
)  # fmt: skip
def test_a_broken_line_is_refused_by_its_number(line, message, tmp_path, monkeypatch):
    import guided_decode.cli.trace

    monkeypatch.setattr(guided_decode.cli.trace, "load_policy", None)
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "fine"}\n' + json.dumps(line) + "\n")
    said = run("trace", file, code=2).stderr
    assert f"in.jsonl, line 2: {message}" in said


def test_a_line_that_is_not_there_is_refused(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "fine"}\n')
    assert f"--line 3: {file} has no such line" in run("trace", file, "--line", 3, code=2).stderr


def test_settings_that_change_logits_before_guidance_are_said(tmp_path):
    import shutil

    folder = tmp_path / "policy"
    shutil.copytree(tiny_tulu.model_path("sft"), folder, symlinks=False)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    _, said = traced([{"prompt": QUESTION, "response": "5"}], tmp_path, "--policy", folder,
                     "--scorer", "tiny-tulu-value")  # fmt: skip
    assert "the policy's generation config has repetition_penalty 1.3" in said


def test_a_model_of_nothing_but_ids_needs_a_tokenizer(tmp_path):
    said = run("trace", *WORDS, "--policy", models.saved("llama", "lm"),
               "--scorer", "tiny-tulu-value", "--output", tmp_path / "x", code=2)  # fmt: skip
    assert "cannot load the tokenizer of policy" in said.stderr


def test_what_a_token_would_add_is_read_after_those_before_it():
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    ids = tokenizer("11 c1\n é", add_special_tokens=False).input_ids
    texts = [next_texts(tokenizer, ids[:i], [token])[0] for i, token in enumerate(ids)]
    assert texts[:4] == ["1", "1", " c", "1"]
    # The last byte of a character brings it.
    assert texts[-1] == "é"
    assert texts[-2] == "\ufffd"
    assert next_texts(tokenizer, ids[:2], [ids[2], tokenizer.eos_token_id]) == [" c", "</s>"]
