"""Guidance on the logits: advantages of the candidates, the rule, and the tail, in place."""

import torch
from torch import Tensor


def guide_logits(
    logits: Tensor,  # [rows, vocab] any float, changed in place
    candidates: Tensor,  # [rows, k] int64, -1 where padded
    values: Tensor,  # [rows, k] float32
    baseline: Tensor,  # [rows] float32
    *,
    beta: Tensor,  # [rows] float32
    margin: Tensor,  # [rows] float32
    keep_tail: Tensor,  # [rows] bool
    mean_baseline: Tensor,  # [rows] bool
    scored: Tensor,  # [rows, k] bool
    penalty: Tensor | None = None,  # [rows, k] float32
    min_keep: int = 1,
) -> Tensor:
    """Rewrites each row's logits by its candidates' advantages.

    With S the scored candidates of a row and C all of them:

        base  = mean over S of values           where mean_baseline, else baseline
        A(a)  = values(a) − base − penalty(a)   for a in S;  0 for the rest of C
        l'(a) = l(a) + beta · A(a)              for a in C,
                −inf where a in S and A(a) < max over S of A − margin, unless A(a) is among
                the min_keep largest of S
        l'(a) = l(a) where keep_tail, else −inf outside C

    "reweight" is margin = inf, "prune" is beta = 0. A candidate that is not scored (a terminal
    under the "baseline" rule, every candidate of a gated row) is neither shifted nor pruned, and
    its logit keeps its bits.

    Args:
        logits: [rows, vocab], changed in place; the arithmetic is float32.
        candidates: int64 [rows, k], distinct within a row, padded with -1.
        values: float32 [rows, k]; read where scored.
        baseline: float32 [rows].
        beta: float32 [rows].
        margin: float32 [rows], inf for no pruning.
        keep_tail: bool [rows].
        mean_baseline: bool [rows].
        scored: bool [rows, k].
        penalty: float32 [rows, k], kl_coef · (log π − log π_ref), or None.
        min_keep: how many scored candidates of a row pruning leaves at least.

    Returns:
        logits.
    """
    valid = candidates >= 0
    scored = scored & valid
    quality = values.masked_fill(~scored, 0.0)
    mean = quality.sum(-1) / scored.sum(-1).clamp(min=1)
    advantage = quality - torch.where(mean_baseline, mean, baseline)[:, None]
    if penalty is not None:
        advantage = advantage - penalty
    advantage = advantage.masked_fill(~scored, 0.0)
    best = advantage.masked_fill(~scored, -torch.inf).topk(min(min_keep, valid.shape[-1])).values
    pruned = scored & (advantage < torch.minimum(best[:, :1] - margin[:, None], best[:, -1:]))

    # Padding repeats the row's first candidate, so that one scatter serves ragged rows.
    first = valid.int().argmax(-1, keepdim=True)
    index = torch.where(valid, candidates, candidates.gather(-1, first)).clamp(min=0)
    own = logits.gather(-1, index)
    shifted = (own.float() + beta[:, None] * advantage).to(logits.dtype)
    guided = torch.where(scored & (beta != 0)[:, None], shifted, own)
    guided = guided.masked_fill(pruned, -torch.inf)
    guided = torch.where(valid, guided, guided.gather(-1, first))

    logits.masked_fill_(~keep_tail[:, None], -torch.inf)
    return logits.scatter_(-1, index, guided)
