"""What a scorer is asked: candidates that are what they should be, in the scorer's words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_decode.growable import Ints

_INTEGERS = (torch.int64, torch.int32, torch.int16)


def check_asked(prefixes: Sequence[Any], candidates: Tensor, vocab_size: int) -> None:
    """Raises ValueError: other than rows of prefixes, and integers [rows, k] of at most all."""
    if isinstance(prefixes, str | bytes) or not hasattr(prefixes, "__len__"):
        raise ValueError(
            f"prefixes came as {type(prefixes).__name__}: expected a sequence of rows, each the "
            "unpadded token ids of one prefix or its handle"
        )
    if not isinstance(candidates, Tensor):
        raise ValueError(
            f"candidates came as {type(candidates).__name__}: expected a tensor, int64 "
            f"[{len(prefixes)}, k], padded with -1; wrap them in torch.tensor"
        )
    shape = candidates.shape
    if len(shape) != 2 or shape[0] != len(prefixes) or candidates.dtype not in _INTEGERS:
        raise ValueError(
            f"candidates came as {candidates.dtype} {list(shape)} for "
            f"{len(prefixes)} prefixes: expected int64 [{len(prefixes)}, k], padded with -1"
        )
    if shape[1] > vocab_size:
        raise ValueError(
            f"k={shape[1]} candidates a row are more than the vocabulary of {vocab_size} tokens"
        )


class Asked(NamedTuple):
    """Candidates on the host, ids int64 [rows, k].

    padded: whether some are -1. repeats: whether a row names one twice; empty where none does.
    """

    ids: Ints
    padded: bool
    repeats: Sequence[bool]

    def of_row(self, i: int) -> tuple[Ints, Ints]:
        """A row's distinct candidates, and where each unpadded one stands among them."""
        own: Ints = self.ids[i]
        if self.padded:
            own = own[own >= 0]
        if self.repeats and self.repeats[i]:
            distinct, inverse = np.unique(own, return_inverse=True)
            return distinct, inverse
        return own, np.arange(len(own))


def on_host(candidates: Tensor) -> tuple[Asked, tuple[int, int]]:
    """Candidates that were checked, and the least and the largest id among them, or 0: in one
    copy, which waits for the device."""
    ids: Ints = candidates.cpu().numpy().astype(np.int64, copy=False)
    if not ids.size:
        return Asked(ids, padded=False, repeats=()), (0, 0)
    # -1 is padding.
    lowest, highest = int(ids.min()), int(ids.max())
    asked = Asked(ids, padded=lowest < 0, repeats=_repeats(ids, padded=lowest < 0))
    return asked, (0 if lowest == -1 else lowest, highest)


def _repeats(ids: Ints, *, padded: bool) -> Sequence[bool]:
    ordered = np.sort(ids, -1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if padded:
        twice &= ordered[:, 1:] >= 0
    return twice.any(-1).tolist() if twice.any() else ()
