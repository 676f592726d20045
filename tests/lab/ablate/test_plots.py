"""Pictures of an ablation: the same bytes for the same figures, whatever the names."""

import pytest

from guided_decode.lab.ablate.grid import PLAIN, Setting
from guided_decode.lab.ablate.plots import draw
from guided_decode.lab.ablate.summary import Figures
from guided_decode.lab.bootstrap import Interval

pytest.importorskip("matplotlib")


def row(policy, name, cost, quality, exact=True, **given):
    setting = Setting(policy, None, PLAIN, name, given, tuple(given))
    return Figures(setting, 10, 1, quality, cost, exact, 0, 0, 0, cost, cost, 1, 1, None)


ROWS = [
    row("sft", "plain", 0.0, Interval(0.5, 0.4, 0.6)),
    row("sft", "a $\\frac{1$ name", 3.0, Interval(0.7, 0.6, 0.8), exact=False, n=2),
    row("sft", "a $\\frac{1$ name", 5.0, Interval(0.9, 0.8, 0.95), exact=False, n=4),
    # An end that rounding put on the other side of the mean.
    row("ppo $", "plain", 1.0, Interval(0.9, 0.9000000000000001, 0.8999999999999999)),
    row("ppo $", "unknown", None, Interval(1.0, 0.9, 1.0)),
]


def picture(rows):
    return draw(rows, lambda each: each.kl, "nats", "reward", bounds=True)


def test_the_same_figures_are_the_same_bytes():
    first, second = picture(ROWS), picture(ROWS)
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    assert b"<dc:date>" not in first["svg"]
    assert first != picture(ROWS[:3])


def test_a_cost_that_nobody_knows_leaves_an_empty_picture():
    assert set(draw(ROWS, lambda each: None, "nats", "reward")) == {"png", "svg"}
