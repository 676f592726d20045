"""The trace as a tree, as data, and as the text of a page: without a browser."""

import base64
import hashlib
import html.parser
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_decode import GuidanceConfig
from guided_decode.lab.trace import Run, TracedPrompt, page
from guided_decode.lab.trace.branches import branches
from guided_decode.lab.trace.data import as_data
from tests.lab import traces


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_responses_are_the_ways_through_their_tree(responses):
    tree = branches(responses)

    def way(i):
        own = tree[i]
        before = [] if own.parent is None else way(own.parent)
        assert own.begin == len(before) < own.end
        assert own.parent is None or own.parent < i
        return before + list(responses[own.of][own.begin : own.end])

    ended = {run: way(i) for i, own in enumerate(tree) for run in own.ending}
    assert ended == {i: list(response) for i, response in enumerate(responses)}
    # Branches after one begin differently, else they would be one.
    starts = [(own.parent, responses[own.of][own.begin]) for own in tree]
    assert len(set(starts)) == len(starts)


def test_no_branch_follows_another_alone_without_an_end_between():
    tree = branches([[1, 2, 3, 4], [1, 2, 5], [1, 2]])
    assert [(b.parent, b.of, b.begin, b.end, b.ending) for b in tree] == [
        (None, 0, 0, 2, (2,)),
        (0, 0, 2, 4, (0,)),
        (0, 1, 2, 3, (1,)),
    ]


def test_data_have_every_number_of_every_step():
    steps = [traces.step(1, 3), traces.step(0, 3, seed=1, outside=True)]
    run = Run("guided", [101, 999], ["a", "b"], steps, [["x", "a", "z"], ["p", "q", "r", "b"]],
              [0.5, None], guided=True)  # fmt: skip
    data = as_data(traces.trace(TracedPrompt("p", [("user", "hi")], [run])))
    (prompt,) = data["prompts"]
    (own,) = prompt["runs"]
    assert own["path"] == [[0, 1, 0, 0.5], [1, 3, 1, None]]
    for listed, step, texts in zip(prompt["steps"], steps, run.texts, strict=True):
        baseline, considered, rows = listed
        assert (baseline, considered) == (step.baseline, step.considered)
        told = [data["tokens"][row[0]] for row in rows]
        assert told == [[t, text] for t, text in zip(step.tokens, texts, strict=True)]
        for row, *numbers in zip(
            rows, step.probabilities, step.guided, step.values, step.advantages, strict=True
        ):
            assert row[1:] == [None if n is None else pytest.approx(n, rel=1e-3) for n in numbers]
    assert data["guidance"] == {"rule": "reweight", "beta": 1.0, "top_k": 4, "tail": "mask"}


def test_settings_that_are_no_defaults_are_told():
    config = GuidanceConfig(rule="prune", margin=0.5, top_k=None, gate=0.9, baseline="mean")
    prompt = TracedPrompt("", [], [traces.run(["a"])])
    assert as_data(traces.trace(prompt, config=config))["guidance"] == {
        "rule": "prune", "margin": 0.5, "top_k": "all", "tail": "mask", "baseline": "mean",
        "gate": 0.9,
    }  # fmt: skip


def test_responses_share_the_steps_of_their_common_beginning():
    first, second = traces.run(list("abc")), traces.run(list("abd"), own=1)
    # The last token of the second is none of the first's candidates there.
    other = traces.step(1, seed=2, outside=True)
    second = Run("b", [*second.ids[:2], 999], second.pieces, [*second.steps[:2], other],
                 [*second.texts[:2], ["o0", "o1", "o2", "o3", "d"]], second.after)  # fmt: skip
    data = as_data(traces.trace(TracedPrompt("", [], [first, second], method="cd", chosen=0)))
    (prompt,) = data["prompts"]
    paths = [[each[:3] for each in run["path"]] for run in prompt["runs"]]
    assert paths == [[[0, 1, 0], [1, 1, 0], [2, 1, 0]], [[0, 1, 0], [1, 1, 0], [2, 4, 1]]]
    assert prompt["branches"] == [[None, 0, 0, 2, []], [0, 0, 2, 3, [0]], [0, 1, 2, 3, [1]]]


def test_the_scale_is_not_that_of_one_outlier():
    runs = [traces.run(["a"] * 40)]
    wild = traces.step(1)
    wild = Run("w", wild.tokens[1:2], ["b"], [
        type(wild)(*[getattr(wild, n) for n in ("tokens", "chosen", "outside", "considered",
                                                "probabilities", "guided", "values")],
                   (0.0, 500.0, 0.0, 0.0), 0.25)], [list("wxyz")], [0.1])  # fmt: skip
    data = as_data(traces.trace(TracedPrompt("", [], [*runs, wild])))
    assert 0 < data["scale"] < 1


def test_visits_are_told_by_the_rows_of_their_steps():
    run = traces.run(["a", "b"], visits=[{101: 7, 100: 3, 12345: 1}, {132: 10}])
    data = as_data(traces.trace(TracedPrompt("", [], [run], method="ppo-mcts", chosen=0)))
    assert data["prompts"][0]["runs"][0]["visits"] == [[[1, 7], [0, 3]], [[1, 10]]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"after": [1.0]}, r"'guided' have \[2, 2, 2, 1\] entries: expected one for each of its 2"),
        ({"visits": [{}]}, "visits of 'guided' has 1 entries: expected one for each of its 2"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(fields, message):
    own = traces.run(["a", "b"])
    parts = {name: getattr(own, name) for name in own.__slots__} | fields
    with pytest.raises(ValueError, match=message):
        Run(**parts)


def test_a_prompt_without_a_response_is_refused():
    with pytest.raises(ValueError, match="prompt 'line 2' came without a response"):
        TracedPrompt("line 2", [], [])


class Elements(html.parser.HTMLParser):
    """The elements of a page as a browser finds them, and the text in its scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.styles, self.now = [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.now = tag

    def handle_data(self, text):
        if self.now in ("script", "style"):
            (self.scripts if self.now == "script" else self.styles).append(text)

    def handle_endtag(self, tag):
        self.now = None


def test_hostile_text_adds_no_element_and_is_whole_in_the_data():
    plain = traces.trace(TracedPrompt("", [("user", "hi")], [traces.run(["a"])]))
    found, usual = Elements(page(traces.hostile())), Elements(page(plain))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in usual.tags]
    # An entity would be text, and a browser reads none in a script.
    text = found.scripts[0]
    assert text.isascii()
    assert not set("<>&") & set(text)
    data = json.loads(text)
    worst = "".join(traces.HOSTILE)
    assert data == json.loads(json.dumps(as_data(traces.hostile())))
    assert data["policy"] == data["prompts"][0]["messages"][0][1] == worst
    assert data["prompts"][0]["runs"][0]["pieces"] == traces.HOSTILE


def test_equal_traces_make_equal_bytes_in_ascii():
    first, second = page(traces.hostile()), page(traces.hostile())
    assert first == second
    assert first.isascii()


def test_the_page_may_run_its_own_script_and_nothing_else():
    text = page(traces.hostile())
    found = Elements(text)
    (policy,) = [attributes["content"] for tag, attributes in found.tags
                 if attributes.get("http-equiv") == "Content-Security-Policy"]  # fmt: skip
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    digests = {
        f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
        for part in (found.scripts[1], "".join(found.styles))
    }
    assert {rules["script-src"], rules["style-src"]} == digests
    assert {name: rule for name, rule in rules.items() if name not in ("script-src", "style-src")} \
        == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}  # fmt: skip
    # Nothing that would ask a network, and nothing that a style's hash would not allow.
    assert not [a for _, a in found.tags if {"src", "href", "style", "onload"} & a.keys()]
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket|import|eval|innerHTML)\b",
                         found.scripts[1])  # fmt: skip
    assert not re.search(r"url\(|@import", "".join(found.styles))


def test_512_tokens_with_16_candidates_stay_below_a_megabyte():
    pieces = [f" word{i}" for i in range(512)]
    runs = [traces.run(pieces, k=16, own=own, name=name) for own, name in ((0, "a"), (1, "b"))]
    text = page(traces.trace(TracedPrompt("", [("user", "hi")], runs)))
    data = as_data(traces.trace(TracedPrompt("", [], runs)))
    # From the second token on the two share no step.
    assert len(data["prompts"][0]["steps"]) == 1023
    assert len(text) < 1_000_000
