"""A head on the tiny policy's own trunk: its file, its configuration, and the model of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head
from tests import models
from tests.integrations.vllm import vllm_parts

# A block of vLLM's attention on a CPU.
BLOCK = 32
WEIGHT = torch.randn(1, 48, generator=torch.Generator().manual_seed(3)) * 0.3


def head_file(weight: torch.Tensor = WEIGHT) -> str:
    """Its path; made once a size."""
    path = models.scratch() / f"head-{weight.shape[1]}.safetensors"
    save_trunk_head(path, TrunkHead(weight))
    return str(path)


def tap_config(**own: Any) -> dict[str, Any]:
    """additional_config with the head."""
    return {"guided_decode": {"scorer": head_file(), "kind": "trunk-head", "log_every": 0, **own}}


class PolicyWithHead(nn.Module):
    """The policy's trunk and the head as one critic, as `oracle.Values` reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = vllm_parts.policy().model
        self.score = nn.Linear(48, 1, bias=False)
        self.score.weight.data = WEIGHT
