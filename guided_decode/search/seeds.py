"""Seeds of a search's draws, each a function of where in the search it is drawn."""

from __future__ import annotations

import hashlib
import struct


def derive(seed: int, *where: int) -> int:
    """A seed of 62 bits for one place, from the search's seed."""
    text = struct.pack(f"<{len(where) + 1}q", seed, *where)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


def uniform(seed: int, *where: int) -> float:
    """A number in [0, 1) for one place."""
    return derive(seed, *where) / 2.0**62
