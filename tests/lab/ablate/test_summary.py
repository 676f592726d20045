"""What an ablation amounts to: comparisons, equal cost, the front; and how far methods go."""

import itertools
import json
import math

import pytest

from guided_decode.lab.ablate.divergence import most_divergence
from guided_decode.lab.ablate.estimate import most_tokens
from guided_decode.lab.ablate.grid import PLAIN, Setting, blocks, products
from guided_decode.lab.ablate.outcomes import Answer, Outcome
from guided_decode.lab.ablate.summary import at_equal_cost, front, summarise
from guided_decode.lab.ablate.tables import page, response_lines, rows_of
from guided_decode.lab.paired_tests import holm, sign_flip_test
from guided_decode.search import METHODS


def answer(reward, tokens=100, kl=None, bound=None, log_prob=None):
    return Answer("text", 10, "eos", None, log_prob, kl, bound, tokens, 0.0, 40, 5, None, reward)


def outcome(name, by_seed, **given):
    """by_seed: rewards, and tokens or fields of the answers."""
    method = PLAIN if name == "plain" else name
    setting = Setting("sft", None if name == "plain" else "v", method, name, given, tuple(given))
    return Outcome(
        setting,
        {
            seed: [answer(*each) if isinstance(each, tuple) else answer(each) for each in own]
            for seed, own in enumerate(by_seed)
        },
    )


PLAIN_ONE = outcome("plain", [[0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]])


def test_every_setting_is_compared_with_plain_on_the_same_prompts():
    better = outcome("guide", [[1, 1, 1, 1, 1, 0]], beta=1.0)
    same = outcome("guide", [[0, 1, 0.5, 0, 0.5, 0]], beta=0.0)
    rows = summarise([PLAIN_ONE, better, same])
    assert rows[0].over_plain is None
    assert (rows[0].quality.mean, rows[0].seeds, rows[1].seeds) == (pytest.approx(1 / 3), 2, 1)
    # Of plain's two seeds the mean counts: 0, 1, 0.5, 0, 0.5, 0.
    apart = [1, 0, 0.5, 1, 0.5, 0]
    p_values = [sign_flip_test(apart), 1.0]
    for row, p, corrected in zip(rows[1:], p_values, holm(p_values), strict=True):
        assert (row.over_plain.p, row.over_plain.p_holm) == (p, corrected)
    assert rows[1].over_plain.difference.mean == pytest.approx(0.5)
    assert rows[2].over_plain.difference.mean == 0.0


def test_a_divergence_is_exact_or_the_least_bound():
    exact = outcome("guide", [[(1, 9, 0.2), (1, 9, 0.4)]], beta=1.0)
    by_method = outcome("best-of-n", [[(1, 9, None, 0.5, -3.0), (1, 9, None, 0.5, -2.0)]], n=2)
    by_text = outcome("smc", [[(1, 9, None, 7.0, -3.0), (1, 9, None, 7.0, -2.0)]], particles=9)
    unknown = outcome("cards", [[(1, 9), (0, 9)]], target=1.0)
    found = [each.divergence() for each in (exact, by_method, by_text, unknown)]
    assert found == [(pytest.approx(0.3), True), (0.5, False), (2.5, False), (None, False)]


def test_settings_are_chosen_on_the_other_half():
    # On even prompts n = 2 is the better one, on odd ones n = 4: each is counted where it was not
    # chosen, so that neither gets what it was chosen by.
    cheap = outcome("best-of-n", [[(0.9, 150), (0, 150), (0.9, 150), (0, 150)]], n=2)
    dear = outcome("best-of-n", [[(0, 180), (0.9, 180), (0, 180), (0.9, 180)]], n=4)
    huge = outcome("best-of-n", [[(1, 900)] * 4], n=64)
    plain = outcome("plain", [[(0, 100), (1, 100), (0, 100), (0, 100)]])
    rows = at_equal_cost([plain, cheap, dear, huge], [2, 10], "best-of-n", "forwarded")
    assert [(row.budget, row.curve, row.quality.mean) for row in rows] == [
        (2, "plain", 0.25), (2, "best-of-n, v", 0.0), (10, "plain", 0.25), (10, "best-of-n, v", 1.0)
    ]  # fmt: skip
    assert rows[1].chosen == ("n 4", "n 2")
    assert rows[1].total_tokens == 165
    assert rows[0].over.difference.mean == 0.25
    assert rows[1].over is None


def test_a_budget_that_nothing_fits_has_plain_alone():
    dear = outcome("best-of-n", [[(1, 300)] * 6], n=4)
    (row,) = at_equal_cost([PLAIN_ONE, dear], [2], "best-of-n", "forwarded")
    assert (row.curve, row.against, row.over) == ("plain", "plain", None)


def test_drawn_tokens_are_the_prompt_and_each_draw():
    # Forwarded three times plain's, drawn as many: 40 and a prompt of 5.
    dear = outcome("best-of-n", [[(1, 300)] * 6], n=4)
    rows = at_equal_cost([PLAIN_ONE, dear], [2], "best-of-n", "drawn")
    assert [(row.curve, row.total_tokens) for row in rows] == [("plain", 45), ("best-of-n, v", 45)]
    (figures,) = summarise([outcome("plain", [[(1, 300)]])])
    assert (figures.total_tokens("forwarded"), figures.total_tokens("drawn")) == (300, 45)


def test_the_front_has_what_nothing_beats():
    costs, qualities = [3, 1, 2, 2, 5, 4], [0.5, 0.2, 0.4, 0.3, 0.6, 0.5]
    found = front(costs, qualities)
    beaten = {
        i for i, j in itertools.permutations(range(6), 2)
        if (costs[j] <= costs[i] and qualities[j] >= qualities[i])
        and (costs[j], qualities[j]) != (costs[i], qualities[i])
    }  # fmt: skip
    assert found == [1, 2, 0, 4]
    assert set(found) == set(range(6)) - beaten


def settings(name, **given):
    needed = {"target": 1.0} if name == "cards" else {}
    needed |= {"margin": 0.1} if name == "prune-and-refill" else {}
    return METHODS[name].checked({**needed, **given})


def test_a_response_is_at_most_so_far_from_the_policy():
    nats = most_divergence
    assert nats("best-of-n", settings("best-of-n", n=4), 9) == math.log(4) - 3 / 4
    assert nats("vote", settings("vote", n=4), 9) == math.log(4)
    one = math.log(6) - 5 / 6
    assert nats("cd", settings("cd", branches=6, block=8), 17) == pytest.approx(3 * one)
    shape = settings("block", width=2, branches=3, block=10, trees=2)
    assert nats("block", shape, 20) == pytest.approx(math.log(2) + 2 * math.log(6))
    assert nats("smc", settings("smc", particles=4, block=10), 11) == pytest.approx(2 * math.log(4))
    # Strings end blocks wherever they come, and other temperatures draw from another policy.
    assert nats("cd", settings("cd", stop=("\n",)), 17) is None
    assert nats("best-of-n", settings("best-of-n", temperature=0.7), 9) is None
    assert nats("cards", settings("cards"), 9) is None


def test_best_of_two_diverges_by_less_than_its_bound():
    # Exactly, over a policy of four responses with a value each.
    policy, value = [0.4, 0.3, 0.2, 0.1], [0.1, 0.9, 0.5, 0.7]
    chosen = [0.0] * 4
    for i, j in itertools.product(range(4), repeat=2):
        chosen[max((i, j), key=lambda k: value[k])] += policy[i] * policy[j]
    kl = sum(q * math.log(q / p) for q, p in zip(chosen, policy, strict=True))
    assert 0 < kl <= most_divergence("best-of-n", settings("best-of-n", n=2), 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_search_costs_at_most_what_was_said(name):
    own = settings(name)
    policy, scorer = most_tokens(name, own, 20, 100, scored=True)
    assert policy >= 120
    assert scorer >= 100
    limited = {**own, "max_policy_tokens": 60, "max_scorer_tokens": 50}
    assert most_tokens(name, limited, 20, 100, scored=True) == (60, 50)


def test_single_tokens_cost_their_candidates():
    assert most_tokens("plain", {}, 20, 100, scored=False) == (120, 0)
    assert most_tokens("guide", {"top_k": 4}, 20, 100, scored=True) == (120, 420)
    assert most_tokens("guide", {"top_k": None}, 20, 100, scored=True) == (120, 120)
    with_kl = {"top_k": 4, "kl_coef": 0.1}
    assert most_tokens("guide", with_kl, 20, 100, scored=True) == (240, 420)


def test_the_grid_has_every_combination_and_block():
    assert list(products({"a": [1, 2], "b": "x"})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert list(products({})) == [{}]
    assert list(blocks(5, 2)) == [(0, 2), (2, 2), (4, 1)]


def test_names_of_the_file_are_no_markup_of_the_page():
    setting = Setting("s|<b>", None, PLAIN, "a|b*c", {})
    odd = Outcome(setting, {0: [answer(1.0), answer(0.0)]})
    text = page("t", [], summarise([odd]), [], [])
    assert r"## s\|\<b\>" in text
    assert r"| a\|b\*c |" in text


def test_small_differences_are_differences():
    apart = [1e-10, 2e-10, 3e-10, 1e-10, 5e-10, 2e-10, 1e-10, 4e-10]
    assert sign_flip_test(apart) == pytest.approx(2 / 2**8, rel=0.2)
    # One among large ones is no step's multiple.
    assert sign_flip_test([1.0, 1.0, 1e-10]) == pytest.approx(0.25, rel=0.1)


def test_equal_differences_have_no_interval():
    plain = outcome("plain", [[0.0, 0.25, 0.5]])
    better = outcome("guide", [[0.5, 0.75, 1.0]], beta=1.0)
    rows = summarise([plain, better])
    assert rows_of(rows)[1]["over_plain"] == 0.5
    assert rows_of(rows)[1]["over_plain_low"] is rows_of(rows)[1]["over_plain_high"] is None
    assert "| +0.500 |" in page("t", [], rows, [], [])


def test_a_prompts_fields_do_not_stand_in_the_place_of_ours():
    plain = outcome("plain", [[1.0]])
    prompt = {"line": 3, "name": "Ada", "reward": 7, "topic": "x", "input": {"key": "k"}}
    (line,) = response_lines([plain], [prompt])
    found = json.loads(line)
    assert (found["name"], found["reward"], found["topic"], found["line"]) == ("plain", 1.0, "x", 3)
    assert found["input"] == {"key": "k", "name": "Ada", "reward": 7}
