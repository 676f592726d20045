"""How lookahead_attention is launched: fixed tiles by dtype and head size, and splits by size."""

from typing import NamedTuple

import torch
from torch import Tensor

from guided_decode.kernels.jit import FLOATS, next_power_of_two
from guided_decode.kernels.merge_splits import MAX_SPLITS

# What an H100 or H200 runs at once, two on each multiprocessor: a few more would run alone.
_PROGRAMS = 264
# A split reads at least so much of the prefix: a shorter one costs more to merge than it saves.
_SHORTEST_SPLIT = 256


class Tile(NamedTuple):
    """Fixed launch parameters. m: rows of a score tile, queries · heads of a group. n: columns.

    plain: columns that all queries see have a loop of their own, whose registers must be there.
    """

    m: int
    n: int
    warps: int
    stages: int
    plain: bool = False


# By float32 or not, and by the power of two that the larger head size fills; the smallest m that
# holds a segment's queries is taken, else the largest. None of them spills on sm_80 or sm_90.
TILES = {
    (False, 64): (Tile(16, 128, 4, 5), Tile(64, 64, 8, 3), Tile(128, 64, 8, 3)),
    (False, 128): (
        Tile(16, 128, 4, 4, plain=True),
        Tile(32, 64, 4, 3, plain=True),
        Tile(64, 64, 8, 3, plain=True),
    ),
    (False, 256): (Tile(16, 32, 4, 5), Tile(64, 32, 8, 2)),
    (True, 64): (Tile(16, 32, 8, 2),),
    (True, 128): (Tile(16, 32, 8, 2),),
    (True, 256): (Tile(16, 16, 8, 1),),
}
# From sm_90 on, where a warpgroup multiplies: measured on an H200.
HOPPER_TILES = TILES | {
    (False, 128): (
        Tile(16, 128, 4, 4, plain=True),
        Tile(32, 64, 4, 4, plain=True),
        Tile(64, 64, 4, 5, plain=True),
    ),
}


def tile_of(query: Tensor, values: Tensor, max_queries: int) -> Tile | None:
    """The launch table's entry; None where a group has more heads, or heads more dimensions."""
    _, heads, head_dim = query.shape
    group = heads // values.shape[1]
    tiles = _tiles(query.dtype, group, max(head_dim, values.shape[2]), _is_hopper(query.device))
    if not tiles:
        return None
    return next((tile for tile in tiles if tile.m >= group * max_queries), tiles[-1])


def has_tile(dtype: torch.dtype, group: int, head_dim: int) -> bool:
    """Whether the kernel takes heads of this size (the larger of key's and value's) and dtype.

    group: query heads that share a key's head.
    """
    return bool(_tiles(dtype, group, head_dim))


def _is_hopper(device: torch.device) -> bool:
    """Whether it is of sm_90 or later; a device that is not here is taken for one."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _tiles(dtype: torch.dtype, group: int, head_dim: int, hopper: bool = True) -> tuple[Tile, ...]:
    size = next_power_of_two(max(head_dim, 64))
    tiles = (HOPPER_TILES if hopper else TILES).get((dtype == torch.float32, size), ())
    return tiles if dtype in FLOATS and tiles and group <= tiles[-1].m else ()


def splits_of(programs: int, max_prefix: int) -> int:
    """Into how many parts the prefix is cut, so that a small batch fills the GPU."""
    wanted = _PROGRAMS // max(1, programs)
    return max(1, min(wanted, -(-max_prefix // _SHORTEST_SPLIT), MAX_SPLITS))
