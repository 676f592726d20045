"""Figures of the demo: intervals of proportions, and divergences from the policy."""

import math

import torch
from torch import Tensor

# Two-sided 95% of the normal distribution.
_Z = 1.959963984540054


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), which holds near 0 and 1 too."""
    if not 0 <= right <= of or of < 1:
        raise ValueError(f"{right} of {of}: expected a count out of at least one")
    share, z2 = right / of, _Z**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def sampled_kl(guided: Tensor, plain: Tensor) -> Tensor:
    """KL(q ‖ π) of one step in nats, float32 [rows], exact.

    Args:
        guided: logits of the decoder that is sampled from, [rows, vocab]; may be −inf.
        plain: the policy's logits, [rows, vocab].
    """
    log_q, log_p = guided.float().log_softmax(-1), plain.float().log_softmax(-1)
    return torch.where(log_q.isneginf(), 0.0, log_q.exp() * (log_q - log_p)).sum(-1)


def greedy_kl(chosen: Tensor, plain: Tensor) -> Tensor:
    """KL of the point mass on the chosen token, int64 [rows], from π: −log π(a), [rows]."""
    log_p = plain.float().log_softmax(-1)
    return -log_p.gather(-1, chosen[:, None])[:, 0]


def best_of_kl(n: int) -> float:
    """The most that best-of-n of whole responses can diverge, in nats: log n − (n − 1)/n.

    Beirami et al., arXiv 2401.01879.
    """
    return math.log(n) - (n - 1) / n
