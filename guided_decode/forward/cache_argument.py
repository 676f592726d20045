"""The name under which a transformers model takes and returns its cache."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# transformers 5.24 renamed it; from 5.40 on the old name is gone.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """Whichever of `CACHE_ARGUMENTS` the model's forward has.

    Raises ValueError: it has neither.
    """
    return _argument_of(type(model).forward)


@functools.cache
def _argument_of(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in parameters:
            return name
    raise ValueError(
        f"{forward.__qualname__} takes neither {' nor '.join(CACHE_ARGUMENTS)}: expected a "
        "model that keeps its keys and values in a cache that it is given"
    )


def returned_cache(output: Mapping[str, Any]) -> Any:
    """The cache that a forward returned.

    Raises ValueError: it returned none.
    """
    for name in CACHE_ARGUMENTS:
        if name in output:
            return output[name]
    raise ValueError(
        f"a forward returned {', '.join(output)}: expected {' or '.join(CACHE_ARGUMENTS)}, in "
        "which its layers keep their keys and values"
    )
