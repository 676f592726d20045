"""Values as files have them."""

import math

import pytest

from guided_decode.cli.search_rows import as_json
from guided_decode.cli.token_values import rounded


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (12.3456789, 12.345679),
        (-0.0123456789, -0.012346),
        (0.0, 0.0),
        (None, None),
        # Ten steps that are right with 1% each: small, and more than eleven of them.
        (0.012345**10, 8.221e-20),
        (-3.456789e-7, -3.457e-07),
        (math.inf, math.inf),
    ],
)
def test_small_values_are_not_rounded_away(value, written):
    assert rounded(value) == written
    assert as_json({"votes": {7: value}}) == {"votes": {"7": written}}
