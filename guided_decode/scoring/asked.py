"""What a scorer is asked: candidates that are what they should be, in the scorer's words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
