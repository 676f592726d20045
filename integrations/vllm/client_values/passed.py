"""What a stream needs no more."""

import math
from collections.abc import Sequence


class PassedTexts:
    """Texts that no choice of a response comes by any more.

    Choices share texts: one is passed when all are longer, or over.
    """

    def __init__(self, choices: int) -> None:
        """choices: that the response has in all, also before they begin."""
        self._choices = choices
        # Tokens of each choice's text, prompt included.
        self._lengths: dict[int, float] = {}
        # By text, its tokens.
        self._behind: dict[bytes, int] = {}
        self._least = 0.0

    def advance(self, index: int, texts: Sequence[bytes], length: int, *, ends: bool) -> None:
        """A choice has these texts behind it, each a token longer than the one before.

        length: tokens of its text now. ends: it gets no longer.
        """
        self._lengths[index] = math.inf if ends else length
        first = length - len(texts)
        self._behind.update((text, first + i) for i, text in enumerate(texts))

    def take(self) -> list[bytes]:
        """Those that were passed since the last call."""
        if len(self._lengths) < self._choices:
            return []
        least = min(self._lengths.values())
        if least == self._least:
            return []
        self._least = least
        passed = [text for text, length in self._behind.items() if length < least]
        for text in passed:
            del self._behind[text]
        return passed
