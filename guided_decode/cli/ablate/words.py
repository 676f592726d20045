"""Errors of the command line and of the library in the words of an ablation's file."""

from __future__ import annotations

from guided_decode.cli.ablate.schema import COMMON, NAMES, POLICY, SCORER, settings_of
from guided_decode.cli.flags import in_flags

_KEYS = {
    name: name for hints in (POLICY, SCORER, *map(settings_of, NAMES)) for name in (*hints, *COMMON)
}


def in_keys(message: str) -> str:
    """An error of the command line, or of the library, in the words of the file: `top_k 0`."""
    words = []
    for word in message.split(" "):
        mark = word.startswith("--") and word[2:3].isalpha()
        words.append(word[2:].replace("-", "_") if mark else word)
    return in_flags(" ".join(words), _KEYS)
