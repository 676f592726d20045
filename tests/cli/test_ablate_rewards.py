"""What responses are worth to `guided-decode ablate`."""

import importlib.util
import json

import pytest

from guided_decode import load_scorer, tiny_tulu
from guided_decode.cli.ablate.rewards import (
    checked_reward,
    model_reward,
    reward_identity,
    textual,
)
from guided_decode.cli.ablate.schema import Model, Reward
from guided_decode.cli.errors import Refusal
from guided_decode.cli.rollout_rows import RolloutRow
from guided_decode.search import ScorerJudge
from guided_decode.search.requests import Judged
from guided_decode.tiny_tulu import lists
from tests.cli.ablations import ablate, ablation, invoke, lines, units, write
from tests.serving.served import ANYWHERE, served


def worth(response, answer, kind, **given):
    row = RolloutRow(1, "in.jsonl, line 1", "key", {"answer": answer}, response=response)
    return textual(Reward(kind, 1, given)).rewards([row])[0]


@pytest.mark.parametrize(
    ("response", "answer", "given", "expected"),
    [
        (" 42\n", "42", {}, 1.0),
        ("Answer: 42", "42", {}, 0.0),
        ("so \\boxed{42} it is", 42, {"find": "final"}, 1.0),
        ("It is 41, no, 42.", "42", {"find": "number"}, 1.0),
        ("Answer: 41", "6 * 7, so #### 42", {"find": "final"}, 0.0),
        ("Answer: 42", "6 * 7, so #### 42", {"find": "final"}, 1.0),
    ],
)
def test_exact_compares_text(response, answer, given, expected):
    assert worth(response, answer, "exact", **given) == expected


@pytest.mark.parametrize(
    ("response", "answer", "given", "expected"),
    [
        ("Answer: 1,042.0", "1042", {}, 1.0),
        ("Answer: 1,042.5", "1042", {}, 0.0),
        ("Answer: 1,042.5", 1042, {"tolerance": 0.001}, 1.0),
        # Relative above 1, absolute below.
        ("Answer: 0.0105", 0.01, {"tolerance": 0.001}, 1.0),
        ("Answer: 0.012", 0.01, {"tolerance": 0.001}, 0.0),
        ("no number", 3, {}, 0.0),
        ("7 or 8", "8", {"find": "number"}, 1.0),
        ("", "8", {}, 0.0),
    ],
)
def test_numeric_compares_numbers(response, answer, given, expected):
    assert worth(response, answer, "numeric", **given) == expected


def test_an_answer_that_is_no_number_is_named():
    with pytest.raises(Refusal, match=r"in.jsonl, line 1: the answer 'blue' has no number"):
        worth("7", "blue", "numeric")


@pytest.mark.parametrize(
    ("response", "pattern", "expected"),
    [
        ("Answer: 3.5", r"^Answer: {answer}$", 1.0),
        # A dot of the answer's is a dot.
        ("Answer: 3x5", r"^Answer: {answer}$", 0.0),
        ("yes, indeed", r"(?i)\bYES\b", 1.0),
        ("no", r"(?i)\bYES\b", 0.0),
    ],
)
def test_regex_finds_a_pattern(response, pattern, expected):
    assert worth(response, "3.5", "regex", pattern=pattern) == expected


def test_a_function_is_asked_about_prompt_and_response():
    row = RolloutRow(
        1, "line 1", "key", messages=[{"role": "user", "content": "Sort 3142."}], response="1234"
    )
    judge = textual(Reward("function", 1, {"function": "guided_decode.tiny_tulu.lists:reward"}))
    assert judge.rewards([row]) == [lists.reward("Sort 3142.", "1234")] == [1.0]


def written(folder, module, worth):
    text = f"""\
import functools
def plainly(prompt, response): return {worth}
cached = functools.lru_cache(plainly)
part = functools.partial(plainly)
class Judge:
    def __call__(self, prompt, response): return {worth}
judge = Judge()
"""
    (folder / f"{module}.py").write_text(text)


def test_a_functions_rewards_are_known_by_the_code_that_was_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    written(tmp_path, "reward_at_reading", 1.0)
    given = Reward("function", 1, {"function": "reward_at_reading:plainly"})
    read, policy = checked_reward(given), Model("sft", 1, "tiny-tulu-sft")
    before = reward_identity(read, policy, None, False)
    written(tmp_path, "reward_at_reading", 2.0)
    assert reward_identity(read, policy, None, False) == before
    assert reward_identity(checked_reward(given), policy, None, False) != before


@pytest.mark.parametrize("name", ["plainly", "cached", "part", "judge"])
def test_other_code_is_another_reward_whatever_is_called(tmp_path, monkeypatch, name):
    module = f"reward_{name}"
    monkeypatch.syspath_prepend(tmp_path)
    given = Reward("function", 1, {"function": f"{module}:{name}"})
    written(tmp_path, module, 1.0)
    before = textual(given).known_as
    written(tmp_path, module, 2.0)
    assert textual(given).known_as != before


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"So $x = \frac{1}{2}$.", "0.5", 1.0),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"The set is $\{1, 3\}$", r"$\{3, 1\}$", 1.0),
        ("The answer is 3.", "4", 0.0),
        ("I do not know.", "4", 0.0),
    ],
)
def test_math_verify_reads_mathematics(response, answer, expected):
    assert worth(response, answer, "math-verify") == expected


def test_without_its_library_math_verify_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'guided-decode\[math\]'"):
        worth("4", "4", "math-verify")


def test_a_reward_model_judges_whole_responses(tmp_path):
    given = ablation(
        prompts={"embedded": "tiny-tulu-lists", "limit": 3},
        policies={"sft": "tiny-tulu-lists-sft"}, methods=["plain"], seeds=[0], max_new_tokens=40,
        reward={"kind": "model", "model": "tiny-tulu-reward"},
    )  # fmt: skip
    file = write(tmp_path / "small.yaml", given)
    ablate(file, "--output", tmp_path / "out", "--no-plots")
    scorer = load_scorer("tiny-tulu-reward", policy_tokenizer=lists.model_path("sft"))
    judge = ScorerJudge(scorer)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lists.model_path("sft"))
    found = lines(tmp_path / "out")
    assert len(found) == 3
    for line in found:
        prompt = tokenizer.encode(tiny_tulu.render(line["prompt"]), add_special_tokens=False)
        ids = tokenizer.encode(line["response"], add_special_tokens=False)
        ended = line["ended"] == "eos"
        ids += [tokenizer.eos_token_id] * ended
        (value,) = judge.judge([Judged(tuple(prompt), tuple(ids), ended)])
        assert line["reward"] == pytest.approx(value, abs=1e-4)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["about"]["reward"]["model"] == "tiny-tulu-reward"


def test_another_reward_model_at_the_same_address_judges_again(tmp_path):
    own = {"policy_tokenizer": lists.model_path("sft")}
    given = ablation(
        prompts={"embedded": "tiny-tulu-lists", "limit": 2},
        policies={"sft": "tiny-tulu-lists-sft"}, methods=["plain"], seeds=[0], max_new_tokens=12,
    )  # fmt: skip
    folder, listen, found = tmp_path / "out", ANYWHERE, []
    for name in ("tiny-tulu-reward", "tiny-tulu-value"):
        with served(load_scorer(name, **own), listen) as server:
            listen = server.address
            given["reward"] = {"kind": "model", "model": listen}
            file = write(tmp_path / "small.yaml", given)
            for _ in range(2):
                ablate(file, "--output", folder, "--no-plots")
                found.append([line["reward"] for line in lines(folder)])
                decoded = units(folder)
            # What the first round of this server left was all there.
            assert len(list((folder / "rewards").iterdir())) == len(found) // 2
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]
    assert units(folder) == decoded


def test_a_training_goes_on_when_the_server_that_judged_is_gone():
    """Nobody is asked: what it judged stays known by its address."""
    policy, reward = Model("sft", 1, "tiny-tulu-sft"), Model("", 1, "tcp://127.0.0.1:9")
    models, options = model_reward(reward, policy, None, False)
    assert models.judge_identity(options).startswith("tcp://127.0.0.1:9 ")


@pytest.mark.slow
def test_a_reward_model_whose_server_is_gone_is_missed_before_anything_is_decoded(tmp_path):
    reward = {"kind": "model", "model": "tcp://127.0.0.1:9", "timeout": 1}  # fmt: skip
    file = write(tmp_path / "small.yaml", ablation(methods=["plain"], reward=reward))
    result = invoke(file, "--output", tmp_path / "out", "--no-plots")
    assert result.exit_code == 2
    assert "tcp://127.0.0.1:9" in result.stderr
    assert not units(tmp_path / "out")
