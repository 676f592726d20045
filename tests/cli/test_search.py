"""`guided-decode search` on tiny-tulu: it writes what the library finds and `score` says."""

import functools
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from guided_decode import load_scorer, tiny_tulu
from guided_decode.checkpoints.registry import find
from guided_decode.cli.app import app
from guided_decode.cli.search_options import BudgetOptions, MethodOptions
from guided_decode.cli.search_plan import read_plan
from guided_decode.search import METHODS, ScorerJudge, load_generator, run
from guided_decode.search.answers import final_answer
from guided_decode.search.seeds import derive
from tests.cli.search_runs import (
    PROMPTS,
    SMALL,
    agree,
    options,
    read,
    refused,
    search,
    write,
    write_prompts,
)


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
    return write_prompts(tmp_path_factory.mktemp("prompts") / "in.jsonl")


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


def test_a_kl_term_compares_with_the_reference():
    shape = {"simulations": 8, "k": 4, "c_puct": 0.3, "prior_temperature": 5.0}
    words = ["--method", "ppo-mcts", *options(shape), "--max-new-tokens", 12, "--policy",
             "tiny-tulu-ppo", "--prompt", PROMPTS[0]]  # fmt: skip
    (line,) = search(*words, "--kl-coef", 0.5, "--reference", "tiny-tulu-sft")
    tuned = load_generator(tiny_tulu.model_path("ppo"), reference=tiny_tulu.model_path("sft"))
    begun = METHODS["ppo-mcts"].begin(
        tuned.encode(tiny_tulu.render(PROMPTS[0])), seed=derive(0, 0), max_tokens=12,
        kl_coef=0.5, **shape,
    )  # fmt: skip
    found = run(begun, tuned, judge())
    assert line["response"] == tuned.decode(found.best.tokens)
    assert line["details"]["visits"] == [
        {str(token): visits for token, visits in each.items()} for each in found.details["visits"]
    ]
    (without,) = search(*words)
    assert without["details"]["visits"] != line["details"]["visits"]


def test_a_head_on_the_policys_own_hidden_states_judges():
    head = tiny_tulu.trunk_head_path("ppo")
    words = ["--method", "cd", *options({"branches": 2, "block": 12}), "--max-new-tokens", 30]
    models = ["--policy", "tiny-tulu-ppo", "--head", head]
    (line,) = search(*words, *models, "--prompt", PROMPTS[0])
    scorer = load_scorer(tiny_tulu.model_path("ppo"), kind="trunk-head", head=head)
    own = load_generator(tiny_tulu.model_path("ppo"))
    begun = METHODS["cd"].begin(
        own.encode(tiny_tulu.render(PROMPTS[0])), seed=derive(0, 0), max_tokens=30, branches=2,
        block=12,
    )  # fmt: skip
    found = run(begun, own, ScorerJudge(scorer, terminals=own.eos_token_ids))
    assert line["response"] == own.decode(found.best.tokens)
    assert line["score"] == pytest.approx(found.best.score, abs=1e-5)


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


def test_settings_are_listed_as_they_are_typed():
    lines = CliRunner().invoke(app, ["search", "--method", "dvts", "--list-settings"]).stdout
    assert lines.splitlines() == [
        "dvts: diverse verifier tree search: trees of steps",
        "  --width                1",
        "  --branches             4",
        "  --block                2048",
        "  --margin               none",
        "  --trees                4",
        "  --leave                false",
        "  --patient              false",
        "  --spread               false",
        "  --stop-ends            false",
        "  --temperature          0.8",
        "  --top-p                1.0",
        '  --stop                 ["\\n\\n"]',
        "  --max-new-tokens       512",
        "  --answer               none",
    ]


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


def test_responses_of_a_known_policy_end_where_its_training_ended_them():
    orz = find("Open-Reasoner-Zero/Open-Reasoner-Zero-0.5B")

    def settings(name, policy=orz, **given):
        plan = read_plan(name, MethodOptions(**given), None, None, BudgetOptions(), 0)
        return plan.ending(policy).settings

    assert "</answer>" in orz.stop
    assert settings("vgs") == {"stop": orz.stop, "stop_ends": True}
    assert settings("vgs", width=2, stop_ends=False) == {
        "stop": orz.stop, "stop_ends": False, "width": 2,
    }  # fmt: skip
    assert settings("best-of-n") == {"stop": orz.stop}
    # What was said stands, and a method's own steps; ppo-mcts has no strings.
    assert settings("vgs", stop=["\n"]) == {"stop": ("\n",)}
    assert settings("dvts") == settings("ppo-mcts") == settings("vgs", policy=None) == {}
    assert settings("dvts", stop_ends=True) == {"stop_ends": True}
    message = refused("--method", "smc", "--stop-ends", "--prompt", "x")
    assert "--stop-ends came without --stop, the text that ends a response" in message
