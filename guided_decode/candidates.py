"""Which tokens are considered: top-k with ties to the lower id, cut by top-p; and the gate."""

from collections.abc import Sequence

import torch
from torch import Tensor


def select_candidates(
    logits: Tensor,  # [rows, vocab] any float
    top_k: int | None = 16,
    top_p: float = 1.0,
    min_keep: int = 1,
) -> Tensor:
    """Each row's candidates, by logit from the largest.

    The top_k largest logits (ties go to the lower token id), of these the smallest set of largest
    ones whose mass under the full softmax at temperature 1 reaches top_p; at least one. Tokens
    at −inf are never candidates. top_k=None considers the whole vocabulary.

    Args:
        logits: [rows, vocab], as the engine hands them over.
        top_k: at least 1 and at most vocab, or None.
        top_p: in (0, 1].
        min_keep: top_p leaves at least so many.

    Returns:
        int64 [rows, k], padded with -1.

    Raises:
        ValueError: top_k is larger than the vocabulary.
    """
    return select_candidates_per_row(logits, [top_k], [top_p], min_keep)


def select_candidates_per_row(
    logits: Tensor,  # [rows, vocab] any float
    top_k: Sequence[int | None],
    top_p: Sequence[float],
    min_keep: int = 1,
) -> Tensor:
    """`select_candidates` with a top_k and a top_p a row (or one of each for all rows).

    One selection, as wide as the largest top_k: int64 [rows, largest k], padded with -1.
    """
    vocab = logits.shape[-1]
    widths = [vocab if k is None else k for k in top_k]
    width = max(widths, default=1)
    if width > vocab:
        raise ValueError(
            f"top_k={width} is larger than the vocabulary of {vocab} tokens: "
            f"expected at most {vocab}, or None for all of it"
        )
    candidates = _largest(logits, width)
    chosen = logits.gather(-1, candidates).float()
    dropped = chosen == -torch.inf
    if min(top_p, default=1.0) < 1.0:
        # The mass of all candidates may round to 1 before the last one: 1 cuts nothing.
        cuts = _column([p if p < 1.0 else torch.inf for p in top_p], torch.float32, logits.device)
        mass = (chosen - log_normaliser(logits)).exp()
        dropped |= mass.cumsum(-1) - mass >= cuts
        dropped[:, :min_keep] = chosen[:, :min_keep] == -torch.inf
    if min(widths, default=width) < width:
        place = torch.arange(width, device=logits.device)
        dropped |= place >= _column(widths, torch.int64, logits.device)
    return candidates.masked_fill_(dropped, -1)


def _column(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)[:, None]


def log_normaliser(logits: Tensor) -> Tensor:
    """log Σ exp(l) over the vocabulary, float32 [rows, 1]."""
    return torch.logsumexp(logits.float(), -1, keepdim=True)


def gated_rows(logits: Tensor, gate: float | Sequence[float]) -> Tensor:
    """Rows whose top token has probability of at least `gate` (one, or one a row), bool [rows]."""
    top = logits.amax(-1, keepdim=True).float()
    each = [gate] if isinstance(gate, int | float) else gate
    gates = _column(each, torch.float32, logits.device)
    return ((top - log_normaliser(logits)).exp() >= gates).squeeze(-1)


def _largest(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, int64 [rows, k]: larger first, ties by the lower id."""
    return (_by_repair if logits.device.type == "cpu" else _by_keys)(logits, k)


def _by_keys(logits: Tensor, k: int) -> Tensor:
    """One top-k over integers that order by (logit, −id), so that nothing ties; no host sync."""
    vocab = logits.shape[-1]
    # Adding zero turns −0.0 into 0.0, which must tie with it.
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(vocab, device=logits.device)
    keys = (ordered << 32) + (vocab - 1 - ids)
    return vocab - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _by_repair(logits: Tensor, k: int) -> Tensor:
    """torch.topk, which breaks ties as it likes, and repairs where that shows; 10 times faster."""
    vocab = logits.shape[-1]
    if k == vocab:
        return logits.sort(dim=-1, descending=True, stable=True).indices
    values, ids = logits.topk(k + 1, dim=-1)
    ids, by_id = ids[:, :k].sort(-1)
    order = values[:, :k].gather(-1, by_id).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(-1, order)
    last = values[:, k - 1]
    # −inf may tie as it likes: it is never a candidate.
    for row in ((last == values[:, k]) & (last > -torch.inf)).nonzero().flatten().tolist():
        above = int((values[row] > last[row]).sum())
        tied = (logits[row] == last[row]).nonzero().flatten()
        ids[row, above:] = tied[: k - above]
    return ids
