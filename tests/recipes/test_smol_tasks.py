"""smol's tasks: splits without a common topic, and judges that are checked by hand-made cases."""

from importlib.util import find_spec

import pytest

from guided_decode import smol
from guided_decode.smol import constraints, sentiment
from guided_decode.smol.topics import topics

KINDS = {kind.name: kind for kind in constraints.CONSTRAINTS}


@pytest.mark.parametrize("task", smol.TASKS.values(), ids=lambda task: task.name)
def test_there_are_enough_prompts_and_none_comes_twice(task):
    counts = {split: len(task.prompts(split)) for split in ("training", "validation", "held-out")}
    assert counts == {"training": 580, "validation": 100, "held-out": 300}
    every = [prompt for split in counts for prompt in task.prompts(split)]
    assert len(set(every)) == len(every)
    assert task.prompts("held-out") == task.prompts("held-out")


def test_no_topic_is_in_two_splits():
    every = [t for split in ("training", "validation", "held-out") for t in topics(split)]
    assert len(set(every)) == len(every)
    for prompt in sentiment.prompts("held-out") + constraints.prompts("held-out"):
        assert any(topic in prompt for topic in topics("held-out")), prompt
        # Not in the words of another one, either.
        assert not any(f"{topic}." in prompt for topic in topics("training")), prompt


def test_an_unknown_task_or_split_is_refused():
    with pytest.raises(ValueError, match="no task 'sums': expected one of sentiment, constraints"):
        smol.find_task("sums")
    with pytest.raises(ValueError, match=r"split 'test': expected one of training, validation, he"):
        smol.find_task("sentiment").prompts("test")


@pytest.mark.skipif(not find_spec("vaderSentiment"), reason="needs the extra smol")
def test_sentiment_is_vaders_compound_score():
    """The first two are of VADER's own README."""
    assert sentiment.reward("", "VADER is smart, handsome, and funny.") == 0.8316
    assert sentiment.reward("", "Today SUX!") == -0.5461
    assert sentiment.reward("", "The train leaves at ten.") == 0.0
    assert sentiment.reward("anything", " \n") == 0.0


def test_without_vader_it_says_what_to_install(monkeypatch):
    sentiment._analyzer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"judged by VADER.*pip install 'guided-decode\[smol\]'"):
        sentiment.reward("", "Good.")


# name, value, what keeps it, what does not
CASES = [
    ("sentences", "two", "One. Two!", "One."),
    ("sentences", "two", "Is it? It is", "One. Two. Three."),
    ("sentences", "two", "Dr. Low paid 3.50 dollars. Fine...", "Wait... what? No."),
    ("sentences", "three", "A! B? C.", "A! B?"),
    ("no commas", "", "Red and blue.", "Red, blue."),
    ("one sentence", "", "Only one", "One. Two."),
    ("word", "blue", "The Blue sky.", "A bluebird."),
    ("word", "never", "Never!", "Nevertheless, ever."),
    ("no word", "the", "Then they left.", "Then THE end."),
    ("no word", "it", "It's well-known.", "That is it."),
    ("at most", "12", "one two three", "a b c d e f g h i j k l m"),
    ("at most", "12", "it's a well-known c d e f g h i j", "1 2 3 4 5 6 7 8 9 10 11 12 13"),
    ("at least", "20", "word " * 20, "word " * 19),
    ("first word", "Once", "Once upon a time.", "At once."),
    ("first word", "Once", '"Once", he said.', "Onceagain."),
    ("short words", "8", "Eight letters: football.", "Nineteen, umbrellas."),
    ("short words", "8", "well-kn", "well-known"),
    ("full stop", "", 'He said "no."', "No"),
    ("full stop", "", "Why? No.\n", "No. Why?"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "kept", "broken"), CASES)
def test_each_constraint_holds_where_it_should(name, value, kept, broken):
    assert KINDS[name].holds(kept, value)
    assert not KINDS[name].holds(broken, value)
    prompt = f"Write about tea. {KINDS[name].render(value)}"
    assert constraints.constraints_of(prompt) == [(KINDS[name], value)]
    assert (constraints.reward(prompt, kept), constraints.reward(prompt, broken)) == (1.0, 0.0)


def test_every_kind_has_cases():
    assert {case[0] for case in CASES} == set(KINDS)


def test_the_reward_is_the_share_of_constraints_that_are_kept():
    prompt = (
        'Describe tea. Use exactly two sentences. Do not use the word "the". Use the word "hot".'
    )
    assert [kind.name for kind, _ in constraints.constraints_of(prompt)] == [
        "sentences", "word", "no word",
    ]  # fmt: skip
    assert constraints.reward(prompt, "Tea is hot. I like it.") == 1.0
    assert constraints.reward(prompt, "The tea is hot.") == pytest.approx(1 / 3)
    assert constraints.reward(prompt, "") == 0.0
    assert constraints.reward(smol.render(prompt), "Tea is hot. I like it.") == 1.0


def test_a_prompt_without_constraints_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a prompt with a constraint .*'Write about tea.'"
    ):
        constraints.reward("Write about tea.", "Tea.")


def test_every_prompt_asks_for_two_constraints_that_go_together():
    for split in ("training", "validation", "held-out"):
        for prompt in constraints.prompts(split):
            names = [kind.name for kind, _ in constraints.constraints_of(prompt)]
            assert len(set(names)) == 2, prompt
            assert set(names) not in constraints._CLASHES, prompt
