"""The mode that models run in here: no autograd, and tensors that outlive the caller's mode."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function without autograd, and outside inference mode if the caller is in it.

    Tensors that are made in inference mode cannot be written to outside of it, and a cache lives
    longer than the call that fills it.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
