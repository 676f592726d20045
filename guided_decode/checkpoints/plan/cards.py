"""Cards: what each holds, and what it reads in a second."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    nominal: the gigabytes in its name. gib: GiB that torch reports of it (`total_memory`), the
    least that was seen. bandwidth: bytes a second by its data sheet; None: not known. assumed: what
    was assumed of it, in words, where it was given by its size alone.
    """

    name: str
    nominal: int
    gib: float
    bandwidth: float | None
    assumed: str | None = None

    @property
    def bytes(self) -> int:
        return int(self.gib * GIB)


# Bandwidths: NVIDIA's and AMD's data sheets. GiB: the "total capacity" in reports of torch.
CARDS: tuple[Card, ...] = (
    Card("H100 SXM", 80, 79.1, 3.35e12),
    Card("H100 PCIe", 80, 79.1, 2.0e12),
    Card("H100 NVL", 94, 93.0, 3.9e12),
    Card("H200", 141, 139.7, 4.8e12),
    Card("B200", 180, 178.3, 7.7e12),
    Card("A100 SXM 80GB", 80, 79.1, 2.039e12),
    Card("A100 PCIe 80GB", 80, 79.1, 1.935e12),
    Card("A100 40GB", 40, 39.3, 1.555e12),
    Card("L40S", 48, 44.3, 0.864e12),
    Card("L4", 24, 22.0, 0.3e12),
    Card("A10G", 24, 22.0, 0.6e12),
    Card("RTX A6000", 48, 47.4, 0.768e12),
    Card("RTX 6000 Ada", 48, 47.4, 0.96e12),
    Card("RTX 3090", 24, 23.5, 0.936e12),
    Card("RTX 4090", 24, 23.5, 1.008e12),
    Card("RTX 5090", 32, 31.3, 1.792e12),
    Card("MI300X", 192, 191.6, 5.3e12),
)
# What a name without its variant means.
_PLAIN = {"h100": "H100 SXM", "a100": "A100 SXM 80GB", "a6000": "RTX A6000"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(GB)|(GiB))", re.IGNORECASE)


def find_card(given: str, bandwidth: float | None = None) -> Card:
    """A card by its name ("H100", "a100-40gb") or by its memory ("80GB").

    Of several cards of one memory the one that reads slowest is meant.

    Args:
        given: a name or a size.
        bandwidth: bytes a second, in place of the card's.

    Raises ValueError: neither a card of the table nor a size, or a bandwidth that is none.
    """
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth={bandwidth!r}: expected bytes a second, a number above 0")
    known = {_key(card.name): card for card in CARDS}
    key = _key(given)
    card = known.get(_key(_PLAIN.get(key, given))) or _of_size(given)
    if card is None:
        raise ValueError(
            f"gpu={given!r}: expected a size, 80GB, or one of "
            f"{', '.join(card.name for card in CARDS)}"
        )
    return card if bandwidth is None else replace(card, bandwidth=bandwidth, assumed=None)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _of_size(given: str) -> Card | None:
    size = _SIZE.fullmatch(given.strip())
    if size is None or not float(size[1]):
        return None
    alike = [card for card in CARDS if size[2] and card.nominal == float(size[1])]
    if not alike:
        gib = float(size[1]) * (1 if size[3] else 1e9 / GIB)
        return Card(given, math.floor(float(size[1])), gib, None)
    slowest = min(alike, key=lambda card: card.bandwidth or math.inf)
    assert slowest.bandwidth is not None
    assumed = f"the {slowest.bandwidth / 1e12:.2f} TB/s of {slowest.name}, the slowest of its size"
    return replace(slowest, name=given, gib=min(card.gib for card in alike), assumed=assumed)
