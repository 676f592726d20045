"""Queries of a packed forward that share their keys, and where those keys lie."""

from dataclasses import dataclass

from torch import Tensor

Runs = tuple[tuple[int, int], ...]
NO_RUNS: Runs = ()


@dataclass(slots=True, frozen=True)
class Stretch:
    """Neighbouring queries that share their keys, the columns of one score matrix.

    queries: where they stand in the packed sequence. runs: (first slot, one past the last) of the
    columns that are read in place; those of `gathered`, int64 [n] on the pool's device, follow.
    mask: [queries, m] of the model's dtype, 0 where a query sees one of the last piece's columns
    (`gathered`, or the only run), else −inf; None where all see all. long: many queries, over one
    piece whose columns are in order; there None means that the queries are the columns, and each
    sees those up to itself.
    """

    queries: slice
    runs: Runs
    gathered: Tensor
    mask: Tensor | None
    long: bool = False
