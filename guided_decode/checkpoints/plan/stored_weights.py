"""What a folder's safetensors say of its weights: numbers and bytes, by their headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The names of safetensors' dtypes end in bits: BF16, I8, U8, F8_E4M3.
_BITS = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """weights: how many numbers. bytes: of them all."""

    weights: int
    bytes: int


def stored_weights(folder: Path) -> StoredWeights | None:
    """Of a checkpoint's folder; None where it has no safetensors, or not all of its shards.

    Raises ValueError: a file of it is cut short or is none.
    """
    files = _files(folder)
    if not files or not all(file.is_file() for file in files):
        return None
    tensors = [tensor for file in files for tensor in _tensors(file)]
    return StoredWeights(
        sum(numel for numel, _ in tensors),
        sum(numel * bits // 8 for numel, bits in tensors),
    )


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: download it again") from error
    return [folder / name for name in sorted(set(map(str, names)))]


def _tensors(file: Path) -> Iterator[tuple[int, int]]:
    """(numbers, bits of each) of a file's tensors."""
    for name, tensor in _header(file).items():
        if name == "__metadata__":
            continue
        try:
            dtype = str(tensor["dtype"])
            bits = _BITS.get(dtype) or int(dtype.lstrip("BFIUC"))
            yield math.prod(tensor["shape"]), bits
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: {name} has no shape and dtype that are known") from error


def _header(file: Path) -> Mapping[str, Any]:
    """8 bytes of its length, then JSON (huggingface/safetensors, README)."""
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError(f"{file} is no safetensors file: download it again")
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise ValueError(f"{file} did not arrive whole: download it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} is no safetensors file: download it again")
    return header
