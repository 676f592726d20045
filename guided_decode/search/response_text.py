"""The text of a response's token ids, exact where a piece ends inside a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class ResponseText:
    """Decodes what a policy wrote, without its special tokens.

    The text is the tokenizer's own decoding, but for the bytes at the end of a piece that are not
    a whole character yet: they are held back, and not shown as U+FFFD, so that the text of a piece
    is a beginning of what it grows into. A tokenizer's clean-up of spaces is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError: nothing says which bytes its tokens are."""
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise ValueError(
                f"the policy's tokenizer is a {type(tokenizer).__name__}, which does not say which "
                "bytes its tokens are: pass its fast tokenizer"
            )
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {i for i, each in added.items() if each.special}
        self._special |= set(tokenizer.all_special_ids)
        self._steps = _steps(json.loads(core.to_str())["decoder"])
        kinds = {step["type"] for step in self._steps}
        self._by_level = "ByteLevel" in kinds
        self._in_bytes = self._by_level or "ByteFallback" in kinds
        known = {"ByteLevel", "Fuse"} if self._by_level else {*_FALLBACK, "Fuse"}
        if self._in_bytes and not kinds <= known:
            odd = ", ".join(sorted(kinds - known))
            raise ValueError(
                f"the policy's tokenizer decodes by {odd} beside bytes, which is not known here: "
                "expected a byte-level BPE, or sentencepiece with byte fallback"
            )

    def decode(self, ids: Sequence[int], *, final: bool) -> str:
        """The text of token ids; final: nothing follows, so that bytes that are none show."""
        shown = [i for i in ids if i not in self._special]
        if not self._in_bytes:
            # Each token is whole characters.
            text = self._tokenizer.decode(shown, clean_up_tokenization_spaces=False)
            return str(text)
        tokens = self._tokenizer.convert_ids_to_tokens(shown)
        # Rows of the embedding that no token has decode to nothing.
        written = b"".join(self._bytes(each) for each in tokens if each is not None)
        decoded = codecs.getincrementaldecoder("utf-8")("replace").decode(written, final)
        return self._stripped(decoded)

    def _bytes(self, token: str) -> bytes:
        if self._by_level:
            try:
                return bytes(_OF_CHARACTER[each] for each in token)
            except KeyError:
                # An added token is written as it is.
                return token.encode()
        for step in self._steps:
            if step["type"] == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
        found = _BYTE.fullmatch(token)
        return bytes([int(found[1], 16)]) if found else token.encode(errors="surrogatepass")

    def _stripped(self, text: str) -> str:
        """Without the space that sentencepiece puts before a text."""
        for step in self._steps:
            if step["type"] == "Strip":
                for _ in range(step["start"]):
                    text = text.removeprefix(step["content"])
        return text


# What sentencepiece's tokenizers decode by.
_FALLBACK = ("Replace", "ByteFallback", "Strip")


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for each in decoder["decoders"] for step in _steps(each)]
    return [decoder]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: bytes that can be seen stand for themselves, the others come after 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_OF_CHARACTER = _byte_of_character()
