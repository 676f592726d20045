"""PPO's two clipped losses; tensors are float32 [rows, width], masks 1 on generated tokens."""

import torch
from torch import Tensor

from recipes.ppo.advantages import masked_mean


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (arXiv 1707.06347), and the fraction of tokens that it clipped."""
    ratio = torch.exp((logps - old_logps) * mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).float(), mask).detach()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """Half the squared error, the larger of the plain and the one near the old value."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * masked_mean(errors, mask)
