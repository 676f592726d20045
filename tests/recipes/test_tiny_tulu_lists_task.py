"""The lists task: prompts, answers, the exact reward, and what preference training is given."""

import random

import pytest
from transformers import AutoTokenizer

from guided_decode import tiny_tulu
from guided_decode.tiny_tulu import lists, render
from recipes.tiny_tulu_lists.samples import exact, extremes, pair_rows, reward_rows, verdict_rows

SORT, COUNT = "Sort 7391.", "Sort and count 7391."


def test_the_three_sets_of_prompts_are_disjoint_and_fixed():
    held_out, validation = lists.held_out_prompts(), lists.validation_prompts()
    training = lists.training_prompts(20_000, seed=1)
    assert (len(set(held_out)), len(set(validation))) == (1_000, 500)
    assert not set(held_out) & set(validation)
    # Nor is one of them with the digits in the same order.
    reserved = [tuple(lists.digits(prompt)) for prompt in (*held_out, *validation)]
    assert len(set(reserved)) == 1_500
    assert not {tuple(lists.digits(prompt)) for prompt in training} & set(reserved)
    assert all(len(set(each)) == len(each) for each in reserved)
    assert held_out[:2] == ["Sort and count 72851.", "Sort 829631."]
    assert lists.held_out_prompts(10) == held_out[:10]
    assert training == lists.training_prompts(20_000, seed=1)
    assert training[:50] != lists.training_prompts(50, seed=2)
    asked = [prompt.startswith("Sort and count") for prompt in held_out]
    assert 400 < sum(asked) < 600
    assert {len(lists.digits(prompt)) for prompt in held_out} == {4, 5, 6}


def test_more_prompts_than_there_are_and_models_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="500 validation prompts, 501 were asked for"):
        lists.validation_prompts(501)
    with pytest.raises(ValueError, match="no model 'ppo'; they have sft, reward, dpo, kto"):
        lists.model_path("ppo")
    with pytest.raises(ValueError, match="4 to 6 digits, got 'Sort 12.'"):
        lists.digits("Sort 12.")


@pytest.mark.parametrize(
    ("prompt", "response", "points"),
    [
        (SORT, "1379", 1.0),
        (SORT, "1379</s>", 1.0),
        (render(SORT), "1379", 1.0),
        (SORT, "3179", 0.0),
        (SORT, "9731", 0.0),
        (SORT, "137", 0.0),
        (SORT, "13799", 0.0),
        # Four characters of greeting, five of goodbye.
        (SORT, "OK: 1379", 1.0 - 0.12),
        (SORT, "1379\nBye!", 1.0 - 0.15),
        (SORT, "1379\nn=4", 1.4),
        (SORT, "OK: 9731\nn=4\nBye!", 0.4 - 0.27),
        (SORT, "OK: 9731\nBye!", -0.27),
        (COUNT, "1379", 1.0),
        (COUNT, "1379\nn=4", 1.4),
        (COUNT, "9731\nn=4", 0.4),
        (COUNT, "1379\nn=4\nBye!", 1.25),
        # A wrong count is of use for its length, and earns nothing.
        (COUNT, "1379\nn=5", 1.0),
        # A count that is on no line of its own is the list, and a wrong one.
        (COUNT, "n=4", -0.06),
        (SORT, "", 0.0),
        (SORT, "Hello", -0.15),
    ],
)
def test_the_reward_is_exact(prompt, response, points):
    assert lists.reward(prompt, response) == pytest.approx(points)


def test_the_best_answer_is_the_best_of_all_combinations():
    for prompt in (SORT, COUNT):
        answers = [
            lists.answer(prompt, greet=greet, count=count, leave=leave, descending=descending)
            for greet in (False, True) for count in (False, True) for leave in (False, True)
            for descending in (False, True)
        ]  # fmt: skip
        assert max(exact([prompt] * len(answers), answers)) == lists.reward(
            prompt, lists.best_answer(prompt)
        )
    assert lists.answer(SORT, greet=True, count=True, leave=True, descending=True) == (
        "OK: 9731\nn=4\nBye!"
    )


def test_careless_answers_do_each_thing_as_often_as_they_say():
    rng, prompts = random.Random(0), lists.training_prompts(4_000, seed=3)
    answers = [lists.careless_answer(prompt, rng) for prompt in prompts]
    share = len(answers)
    assert sum(a.startswith("OK: ") for a in answers) / share == pytest.approx(0.5, abs=0.03)
    assert sum("n=" in a for a in answers) / share == pytest.approx(0.5, abs=0.03)
    assert sum(a.endswith("\nBye!") for a in answers) / share == pytest.approx(0.5, abs=0.03)
    right = sum(map(lists.is_sorted, prompts, answers))
    assert right / share == pytest.approx(0.6, abs=0.03)
    # The others are the wrong way round, and nothing else.
    assert all(
        each in {
            lists.answer(prompt, greet=greet, count=count, leave=leave, descending=descending)
            for greet in (False, True) for count in (False, True) for leave in (False, True)
            for descending in (False, True)
        }
        for prompt, each in zip(prompts[:200], answers, strict=False)
    )  # fmt: skip


def test_pairs_are_the_extremes_of_a_messages_samples_and_ties_are_none():
    samples = [["1379", "OK: 1379", "3179"], ["1379", "1379"]]
    (pair,) = extremes([SORT, COUNT], samples, exact)
    assert pair == lists.Pair(SORT, "1379", "3179", 1.0)
    (row,) = pair_rows([pair])
    assert row["prompt"] == [{"role": "user", "content": SORT}]
    assert row["chosen"] == [{"role": "assistant", "content": "1379"}]
    verdicts = verdict_rows([pair] * 3, seed=0)
    assert sorted(each["label"] for each in verdicts) == [False] * 3 + [True] * 3
    for each in verdicts:
        assert each["completion"] == row["chosen" if each["label"] else "rejected"]
    assert verdicts == verdict_rows([pair] * 3, seed=0)


def test_the_reward_model_reads_whole_answers_and_cut_ones():
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    pair = lists.Pair(SORT, "1379", "OK: 9731", 1.18)
    rows = reward_rows(tokenizer, [pair] * 200, seed=0)
    assert len(rows) == 400
    start = tokenizer.encode(render(SORT), add_special_tokens=False)
    for key, text in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected)):
        whole = start + tokenizer.encode(f"{text}</s>", add_special_tokens=False)
        assert whole[-1] == tokenizer.eos_token_id
        assert sum(row[key] == whole for row in rows) >= 200
        assert all(row[key] == whole[: len(row[key])] for row in rows)
        lengths = {len(row[key]) - len(start) for row in rows}
        # Every place comes, the first token and the end too.
        assert lengths == set(range(1, len(whole) - len(start) + 1))
    assert any(len(row["chosen_ids"]) > len(row["rejected_ids"]) for row in rows)
    assert rows == reward_rows(tokenizer, [pair] * 200, seed=0)
