"""What generators have in common: the policy's text, and an end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from guided_decode.cache.closable import Closable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PolicyText(Closable):
    """Text to token ids and back, what ends a response, and a context that closes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of text as it is, without special tokens of the tokenizer's own."""
        ids: list[int] = self._text().encode(text, add_special_tokens=False)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._text().decode(list(tokens), skip_special_tokens=True))

    def close(self) -> None:
        """Lets go of what the generator holds outside this process; often nothing."""

    def _text(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ValueError(
                f"this generator has no tokenizer: pass {type(self).__name__}(..., tokenizer=...)"
            )
        return self._tokenizer
