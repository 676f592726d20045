"""The mode that models run in here: the caller's autograd, inference and autocast modes end."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function without autograd, autocast or inference mode.

    A cache lives longer than the call that fills it: tensors that are made in inference mode cannot
    be written to outside of it, and keys of another precision would change later answers.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                modes.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run
