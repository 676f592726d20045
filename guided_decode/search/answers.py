"""Answers in the text of responses, for votes: boxed, announced, or the last number."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from decimal import Decimal
from types import MappingProxyType

# The answer in a response's text; None: it has none.
TextAnswer = Callable[[str], Hashable | None]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# A minus between two of them is none of the second's.
_NUMBER = re.compile(r"(?:(?<![\w)\]}])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
# GSM8K's mark, and what a model is asked to write most often, in bold or not.
_ANNOUNCED = re.compile(
    r"(?:####|\banswer\b[*_]*(?:\s+is\b[*_]*\s*:?|\s*:))\s*(?P<answer>[^\n]+)", re.I
)
_TAGGED = re.compile(r"<answer>(?P<answer>.*?)</answer>", re.I | re.S)
_EMPHASIS = "*` "


def final_answer(text: str) -> str | None:
    """The last boxed answer; else the last between <answer> and </answer>; else the last that is
    announced ("Answer: 7", "the answer is 7", "#### 7"); else the last number. Numbers are written
    alike, "7,793.0" as "7793"."""
    if (boxed := boxed_answer(text)) is not None:
        return boxed
    for pattern in (_TAGGED, _ANNOUNCED):
        found = [_written(each["answer"]) for each in pattern.finditer(text)]
        if (said := next((each for each in reversed(found) if each), None)) is not None:
            return said
    return last_number(text)


def boxed_answer(text: str) -> str | None:
    r"""What the last \boxed{} holds; None where none is complete."""
    for found in reversed(list(_BOX.finditer(text))):
        depth = 1
        for i in range(found.end(), len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return _written(text[found.end() : i])
    return None


def last_number(text: str) -> str | None:
    """The last number, without commas, a plus or zeros that say nothing."""
    found = _NUMBER.findall(text)
    return _number(found[-1]) if found else None


ANSWERS = MappingProxyType({"final": final_answer, "boxed": boxed_answer, "number": last_number})


def _written(text: str) -> str | None:
    """An answer without what surrounds it; one that is a number, as numbers are written."""
    bare = text.strip().strip(_EMPHASIS).rstrip(".").strip(_EMPHASIS).strip("$ ").strip()
    return _number(bare) if _NUMBER.fullmatch(bare) else bare or None


def _number(text: str) -> str:
    number = Decimal(text.replace(",", ""))
    whole = number.to_integral_value()
    # As whole numbers are written, and not as 1E+3; a minus before 0 says nothing.
    return str(int(whole)) if number == whole else format(number.normalize(), "f")
