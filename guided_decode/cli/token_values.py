"""What a scorer says of each token of a response, at what a decoder would have paid for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from guided_decode.cli.errors import Refusal

if TYPE_CHECKING:
    from guided_decode.scorer import Scorer

# Rows of one call; the response's tokens are in the cache by then, so a row costs no forward.
_ROWS = 256


def token_values(
    scorer: Scorer,
    prompt: Sequence[int],
    response: Sequence[int],
    terminals: Sequence[int] = (),
) -> list[float | None]:
    """Q of each response token: V up to and with it, or its log-ratio for an implicit reward.

    Args:
        scorer: any scorer.
        prompt: token ids, at least one.
        response: token ids; a terminal may be the last.
        terminals: ids that end a response; None stands for those whose value means nothing
            (terminal rule "baseline").

    Returns:
        One number a token, in the scorer's units.
    """
    import torch

    from guided_decode.guidance.terminal import score_candidates

    if not len(response):
        return []
    whole = torch.tensor([*prompt, *response])
    # One forward for all: the rows below find their prefixes in the cache.
    scorer.score([whole[:-1]], torch.empty(1, 0, dtype=torch.int64))
    values: list[float | None] = []
    for start in range(len(prompt), len(whole), _ROWS):
        ends = range(start, min(start + _ROWS, len(whole)))
        tokens = whole[start : ends.stop, None]
        scores, exempt = score_candidates(
            scorer, [whole[:i] for i in ends], tokens, [terminals] * len(ends)
        )
        row = scores.values[:, 0].float().cpu().tolist()
        skipped = [False] * len(row) if exempt is None else exempt[:, 0].tolist()
        values += [None if skip else v for v, skip in zip(row, skipped, strict=True)]
    return values


def last_value(values: Sequence[float | None]) -> float | None:
    """The last value that means something; None where there is none."""
    return next((value for value in reversed(values) if value is not None), None)


def finite(value: float | None) -> float | None:
    """The value. Raises Refusal: it is no number."""
    if value is not None and not math.isfinite(value):
        raise Refusal(f"the scorer says {value} of it: expected a number")
    return value


def rounded(value: float | None) -> float | None:
    """A value for a file: what lies beyond float32 varies with the batch it was computed in.

    Of what is small four digits stay: products of probabilities are told apart by them.
    """
    if value is None or not value or not math.isfinite(value):
        return value
    return round(value, max(6, 3 - math.floor(math.log10(abs(value)))))
