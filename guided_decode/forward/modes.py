"""The mode that models run in here: the caller's autograd, inference and autocast modes end."""

import contextlib
from collections.abc import Callable
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
        grad = torch.is_grad_enabled()
        try:
            with torch.inference_mode(False), torch.no_grad():
                # Leaving autocast's own context costs as much as a step's whole tree.
                cast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
                if not cast:
                    return function(*args, **kwargs)
                with contextlib.ExitStack() as stack:
                    for kind in cast:
                        stack.enter_context(torch.autocast(kind, enabled=False))
                    return function(*args, **kwargs)
        finally:
            # An interruption while torch enters or leaves a mode leaves it as it then is.
            if torch.is_grad_enabled() is not grad:
                torch._C._set_grad_enabled(grad)

    return run
