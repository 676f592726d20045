"""RewardBench's arithmetic on counts whose scores are known."""

import random

import pytest

from guided_decode.lab.rewardbench import protocol
from guided_decode.lab.rewardbench.outcome import Count, Outcome, Pair


def pair(subset, chosen=1.0, rejected=0.0, prefixes=(0.0, 0.0, 0.0, 0.0)):
    return Pair(subset, chosen, rejected, prefixes, (0.0,) * 4)


def test_the_data_set_has_2985_pairs_in_four_sections():
    sizes = {name: sum(one.pairs for one in protocol.members(name)) for name in protocol.SECTIONS}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431}
    assert sum(sizes.values()) == 2985


@pytest.mark.parametrize(
    ("sections", "score"),
    [((98.0, 59.6, 60.6, 74.7), 73.225), ((96.4, 56.4, 65.8, 62.3), 70.225)],
)
def test_model_cards_print_the_plain_mean_of_four_sections(sections, score):
    named = dict(zip(protocol.SECTIONS, sections, strict=True))
    assert protocol.model_card_score(named) == pytest.approx(score, abs=1e-9)
    assert protocol.leaderboard_score(named) is None
    board = protocol.leaderboard_score(named | {protocol.PRIOR_SETS: 50.0})
    assert board == pytest.approx((2 * sum(sections) + 50.0) / 9, abs=1e-9)
    del named["Safety"]
    assert protocol.model_card_score(named) is None


def test_a_sections_score_weighs_its_subsets_by_size():
    right = {"alpacaeval-easy": 1.0, "alpacaeval-length": 0.0, "alpacaeval-hard": 0.0,
             "mt-bench-easy": 0.0, "mt-bench-med": 0.5}  # fmt: skip
    assert protocol.section_scores(right) == {"Chat": pytest.approx((100 + 20) / 358)}
    del right["mt-bench-med"]
    assert protocol.section_scores(right) == {}


def test_mathematics_weighs_as_much_as_all_programming():
    right = {one.name: 0.0 for one in protocol.members("Reasoning")} | {"math-prm": 1.0}
    assert protocol.section_scores(right)["Reasoning"] == pytest.approx(0.5)


def test_prior_sets_are_a_plain_mean():
    right = dict(zip((one.name for one in protocol.members(protocol.PRIOR_SETS)),
                     (0.5, 0.7, 0.9, 0.1), strict=True))  # fmt: skip
    assert protocol.section_scores(right)[protocol.PRIOR_SETS] == pytest.approx(0.55)


def test_a_tie_is_no_win():
    count = Count()
    for chosen, rejected in ((2, 1), (1, 1), (1, 2), (3, 1)):
        count.add(chosen, rejected)
    assert (count.won, count.ties, count.of, count.accuracy) == (2, 1, 4, 0.5)


def test_counts_do_not_depend_on_the_order_and_prefixes_leave_prior_sets_out():
    pairs = [
        *(pair("math-prm", chosen=i % 3, rejected=1, prefixes=(0, i % 2, 1, 1)) for i in range(9)),
        *(pair("shp", prefixes=(1, 1, 1, 1)) for _ in range(5)),
    ]
    expected = Outcome.of(pairs).as_dict()
    assert expected["subsets"]["math-prm"]["won"] == 3
    assert expected["ties"] == 3
    assert [one["won"] for one in expected["prefixes"].values()] == [0, 4, 9, 9]
    assert {one["pairs"] for one in expected["prefixes"].values()} == {9}
    random.Random(0).shuffle(pairs)
    assert Outcome.of(pairs).as_dict() == expected
