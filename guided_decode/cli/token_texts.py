"""The text of each token of a response."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEAR = 8


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], *, special: bool = False
) -> list[str]:
    """The text that each token adds; joined, they are the whole text.

    Special tokens add theirs, or nothing where `special` is false.

    Tokens that end inside a character add theirs with the one that completes it.
    """
    pieces: list[str] = []
    begin = shown = 0
    for end in range(1, len(ids) + 1):
        known = str(tokenizer.decode(ids[begin:shown], skip_special_tokens=not special))
        text = str(tokenizer.decode(ids[begin:end], skip_special_tokens=not special))
        if text.endswith("�") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        begin, shown = shown, end
    return pieces


def next_texts(
    tokenizer: PreTrainedTokenizerBase, before: list[int], tokens: list[int]
) -> list[str]:
    """The text that each of several tokens would add after those before it, special ones theirs.

    A token that ends inside a character has "\ufffd" there.
    """
    # A few tokens say how the next one is read: whether a space comes first, whose bytes it ends.
    near = before[-_NEAR:]
    known = str(tokenizer.decode(near)).rstrip("\ufffd")
    texts = tokenizer.batch_decode([[*near, token] for token in tokens])
    return [
        text[len(known) :] if text.startswith(known) else str(tokenizer.decode([token]))
        for token, text in zip(tokens, texts, strict=True)
    ]
