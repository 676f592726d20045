"""A copy of a module for a scorer's own use: its weights are shared, all else is its own."""

import copy
from typing import Any

from torch import nn


def own_copy(model: nn.Module) -> Any:
    """The module on its own deep copy of the config, sharing the weights and nothing else."""
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, shared)
