"""Token ids as `generate` takes them: none, one, several, or a tensor."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def token_ids(given: "int | Sequence[int] | Tensor | None") -> list[int]:
    """No id, one, or several, as a list."""
    if given is None:
        return []
    return [int(token) for token in np.atleast_1d(np.asarray(given))]
