"""Stop strings over token ids: text decides, wherever tokens are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Says when the text of a growing piece has come to contain one of some strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        # A token is at least one byte, so that this many at the end hold what can have changed.
        self._tail = 1 + max(len(each.encode()) for each in strings)

    def completed(self, tokens: Sequence[int]) -> bool:
        """Whether one of the strings lies in the text of the piece's last tokens."""
        text = self._tokenizer.decode(list(tokens[-self._tail :]), skip_special_tokens=False)
        return any(each in text for each in self._strings)
