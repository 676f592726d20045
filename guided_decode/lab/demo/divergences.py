"""Divergences of decoders from the policy."""

import math

import torch
from torch import Tensor


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
