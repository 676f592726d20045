"""Value head: final RMSNorm (optional) and a linear head, on the rows that are read."""

import torch
from torch import Tensor


def value_head(
    hidden: Tensor,  # [tokens, hidden] any float
    weight: Tensor,  # [labels, hidden] any float
    bias: Tensor | None = None,  # [labels] any float
    *,
    norm_weight: Tensor | None = None,  # [hidden] any float
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    rows: Tensor | None = None,  # [n] int64
) -> Tensor:
    """Head outputs of the rows that are read, accumulated in float32.

        x = hidden[rows], or all tokens
        x = x / sqrt(mean(x²) + norm_eps) · (norm_offset + norm_weight), if norm_weight is given
        output = x · weightᵀ + bias

    Args:
        hidden: [tokens, hidden]; before the final norm when norm_weight is given, else after it.
        weight: [labels, hidden].
        bias: [labels], or None.
        norm_weight: [hidden]; norm_offset is 1 for Gemma, which stores weight − 1.
        norm_eps: added to the mean square.
        norm_offset: added to norm_weight.
        rows: int64 [n], indices of the tokens that are read.

    Returns:
        float32 [n, labels].

    Raises:
        ValueError: the hidden sizes differ.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden has size {hidden.shape[-1]} but the head's weight has {weight.shape[-1]}: "
            "they should be of one model"
        )
    x = (hidden if rows is None else hidden[rows]).float()
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)
        x = x * (norm_offset + norm_weight.float())
    return torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
