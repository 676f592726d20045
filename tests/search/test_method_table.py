"""Methods by name: each is what its function is at its published settings, and knows no others."""

import inspect
import math

import pytest

from guided_decode import search
from guided_decode.search import (
    MCTS,
    METHODS,
    Blocks,
    Sampling,
    Segments,
    best_of_n,
    block_search,
    find_method,
    ppo_mcts,
    prune_and_refill,
    run,
    segment_rejection,
    sequential_monte_carlo,
    vote,
)
from guided_decode.search.method_table import NEEDED
from tests.search.toy import DEPTH, PROMPT, ToyJudge, ToyPolicy

NEEDS = {"prune-and-refill": {"margin": 0.3}, "cards": {"target": 0.6}}
HOW = Sampling(0.8, stop=("\n\n",))


def first(tokens):
    return tokens[0]


# The functions, with the figures that the papers and their code state.
PUBLISHED = {
    "best-of-n": lambda **own: best_of_n(PROMPT, n=16, **own),
    "vote": lambda **own: vote(PROMPT, answer=first, n=16, **own),
    "weighted-vote": lambda **own: vote(PROMPT, answer=first, n=16, weighted=True, **own),
    "block": lambda **own: block_search(PROMPT, Blocks(4, 4, 32), **own),
    "cd": lambda **own: block_search(PROMPT, Blocks(1, 6, 32), **own),
    "vgs": lambda **own: block_search(PROMPT, Blocks(4, 2, 4096, leave=True, spread=True), **own),
    "dvts": lambda **own: block_search(PROMPT, Blocks(1, 4, 2048, trees=4), sampling=HOW, **own),
    "chunk-beam": lambda **own: block_search(
        PROMPT, Blocks(4, 4, 30, patient=True, spread=True), **own
    ),
    "value-beam": lambda **own: block_search(PROMPT, Blocks(4, 4, 1), **own),
    "prune-and-refill": lambda **own: prune_and_refill(PROMPT, n=16, block=32, margin=0.3, **own),
    "smc": lambda **own: sequential_monte_carlo(
        PROMPT, particles=16, block=32, beta=1.0, threshold=0.5, choice="sample", **own
    ),
    "cards": lambda **own: segment_rejection(PROMPT, Segments(0.6), **own),
    "ppo-mcts": lambda **own: ppo_mcts(PROMPT, MCTS(simulations=10, k=10, c_puct=8.0), **own),
    "ppo-mcts-published": lambda **own: ppo_mcts(
        PROMPT, MCTS(kl_term="probability", end_value="published", look_past=True), **own
    ),
}


def test_every_method_is_held_to_its_figures():
    assert set(PUBLISHED) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_runs_the_method_at_its_published_settings(name):
    policy, judge = ToyPolicy(3), ToyJudge(3)
    method = METHODS[name]
    answer = first if method.votes else None
    begun = method.begin(PROMPT, seed=7, max_tokens=DEPTH, answer=answer, **NEEDS.get(name, {}))
    expected = run(PUBLISHED[name](seed=7, max_tokens=DEPTH), policy, judge)
    found = run(begun, policy, judge)
    assert (found.candidates, found.chosen) == (expected.candidates, expected.chosen)
    assert found.details == expected.details
    assert bool(found.spent.scorer_tokens) == method.judged


def test_every_public_method_is_in_the_table():
    functions = {method.function for method in METHODS.values()}
    own = {
        getattr(search, name) for name in search.__all__
        if inspect.isgeneratorfunction(getattr(search, name))
    }  # fmt: skip
    assert own == functions


def test_what_is_given_replaces_the_preset():
    policy, judge = ToyPolicy(1), ToyJudge(1)
    begun = METHODS["vgs"].begin(
        PROMPT, seed=2, max_tokens=DEPTH, answer=first, width=2, block=2, temperature=0.5
    )
    shape = Blocks(width=2, branches=2, block=2, leave=True, spread=True)
    expected = block_search(
        PROMPT, shape, seed=2, max_tokens=DEPTH, answer=first, sampling=Sampling(0.5)
    )
    found, expected = run(begun, policy, judge), run(expected, policy, judge)
    assert (found.candidates, found.chosen) == (expected.candidates, expected.chosen)
    assert found.details == expected.details


def test_settings_say_what_there_is_and_what_is_needed():
    assert METHODS["best-of-n"].settings == {"n": 16, "temperature": 1.0, "top_p": 1.0, "stop": ()}
    assert METHODS["dvts"].settings["stop"] == ("\n\n",)
    assert METHODS["prune-and-refill"].settings["margin"] is NEEDED
    assert [METHODS[name].votes for name in ("vote", "best-of-n", "vgs")] == [True, False, None]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("best-of-n", {"margin": 0.1}, "margin=0.1: best-of-n has no such setting; it has n, temp"),
        ("smc", {"n": 3}, "n=3: smc has no such setting; it has particles, block, beta"),
        ("cards", {}, "cards needs target=, which has no default"),
        ("ppo-mcts", {"temperature": 1.0}, "temperature=1.0: ppo-mcts has no such setting"),
        ("ppo-mcts", {"c_puct": 0.0}, "c_puct=0.0: expected a number above 0"),
        ("prune-and-refill", {}, "prune-and-refill needs margin=, which has no default"),
        ("vote", {}, "vote votes on answers: pass answer="),
        ("smc", {"answer": first}, "smc takes no vote: drop it"),
        ("best-of-n", {"n": 0}, "n=0: expected an integer of at least 1"),
        ("cd", {"branches": 0}, "branches=0: expected an integer of at least 1"),
        ("cd", {"temperature": -1.0}, "temperature=-1.0: expected a number of at least 0"),
        *(
            (
                name,
                {
                    "max_tokens": 0,
                    **NEEDS.get(name, {}),
                    **({"answer": first} if "vote" in name else {}),
                },
                "max_tokens=0: expected an integer of at least 1",
            )
            for name in METHODS
        ),
        ("weighted-vote", {"n": 0, "answer": first}, "n=0: expected an integer of at least 1"),
        ("prune-and-refill", {"margin": -1.0}, "margin=-1.0: expected a number of at least 0"),
        ("prune-and-refill", {"margin": 1.0, "block": 0}, "block=0: expected an integer"),
        ("smc", {"particles": 0}, "particles=0: expected an integer of at least 1"),
        ("smc", {"threshold": 2.0}, "threshold=2.0: expected a number between 0 and 1"),
        ("smc", {"beta": math.inf}, "beta=inf: expected a finite number"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(name, given, message):
    with pytest.raises(ValueError, match=message):
        next(METHODS[name].begin(PROMPT, **given))


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown \(did you mean best-of-n\?\); expected"):
        find_method("best_of_n")
