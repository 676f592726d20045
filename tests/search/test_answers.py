"""The answers that a vote counts."""

import pytest

from guided_decode.search.answers import boxed_answer, final_answer, last_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1,234.50}", "1234.5"),
        (r"\fbox{$x+1$}", "x+1"),
        (r"\boxed{7} and half a \boxed{8", "7"),
        (r"\boxed{}", None),
        ("no box, 3", None),
    ],
)
def test_boxed(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+4=11 c1", "1"),
        ("it is 1,234,567 of them", "1234567"),
        ("-0.50", "-0.5"),
        ("-0", "0"),
        ("1000.", "1000"),
        ("10-3", "3"),
        ("pages 3-5", "5"),
        ("(2)-4 = -2", "-2"),
        ("x=-7", "-7"),
        ("-.5", "-0.5"),
        ("3.10 or .25", "0.25"),
        ("none", None),
    ],
)
def test_the_last_number(text, answer):
    assert last_number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6+5=11 c1\nAnswer: 10,211", "10211"),
        ("Answer: 3\nno, wait. The answer is 4.", "4"),
        ("She has 5 left.\n#### 5", "5"),
        (r"Answer: 3, that is \boxed{2}", "2"),
        ("The final answer is: $x = 3$", "x = 3"),
        ("2 and 3", "3"),
        # What models write around it.
        ("**Answer:** 7", "7"),
        ("**Answer: 7.**", "7"),
        ("### Final answer\n\nThe final answer is **1,234**.", "1234"),
        ("<think>x</think> <answer> 42 </answer>", "42"),
        ("<answer>\n42\n</answer>", "42"),
        (r"<answer> \boxed{3} </answer>", "3"),
        # The word alone announces nothing.
        ("7 is my answer.", "7"),
        ("I check the answers: 4 and 5, so it is 9.", "9"),
        ("The answer to the question follows: 2 + 2 = 4", "4"),
        ("Answer:\n5", "5"),
        ("", None),
    ],
)
def test_the_final_answer_is_boxed_or_announced_or_a_number(text, answer):
    assert final_answer(text) == answer
