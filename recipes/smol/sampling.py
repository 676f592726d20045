"""Rollouts by a copy of the policy with its adapters merged, in a shorter dtype."""

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor


class MergedSampler:
    """Generates as an adapted policy does, up to the rounding of `dtype`.

    PPO reads the log-probabilities of what was drawn again in float32, so that the rounding moves
    which responses are seen and nothing else.

    Args:
        base: the causal LM without adapters, which is copied.
        dtype: of the copy.
    """

    def __init__(self, base: Any, dtype: torch.dtype) -> None:
        self._copy = copy.deepcopy(base).to(dtype).eval()

    @torch.no_grad()
    def generate(self, policy: Any, **how: Any) -> Tensor:
        """What the `generate` of transformers returns, with the policy's weights of now."""
        for name, module in policy.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                merged: Tensor = module.weight.data.clone()
                for adapter in module.active_adapters:
                    merged += module.get_delta_weight(adapter)
                self._copy.get_submodule(name).weight.copy_(merged)
        return self._copy.generate(**how)
