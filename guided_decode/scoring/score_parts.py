"""A call's rows are scored in parts, each as much as the pool holds; here they come together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from guided_decode.forward.packed_model import Row
from guided_decode.growable import Ints
from guided_decode.scorer import Scores

# A row that was checked, with its number in the call.
Numbered = tuple[int, Row]


class ScoredPart(NamedTuple):
    """rows: int64 [n], whose scores these are, ascending. left: the rows of later parts."""

    rows: Ints
    scores: Scores
    left: Sequence[Numbered]


def together(parts: Sequence[ScoredPart]) -> Scores:
    """The scores of all rows of one part or more, in the rows' order."""
    if len(parts) == 1:
        return parts[0].scores
    values = torch.cat([part.scores.values for part in parts])
    baseline = torch.cat([part.scores.baseline for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    if (rows[1:] > rows[:-1]).all():
        return Scores(values, baseline)
    order = torch.from_numpy(rows.argsort()).to(values.device, non_blocking=True)
    return Scores(values[order], baseline[order])
