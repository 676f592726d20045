"""Which tokens are considered: top-k with ties to the lower id, cut by top-p; and the gate."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.kernels.top_candidates import TopCandidates, top_candidates


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
    width = logits.shape[-1] if top_k is None else top_k
    return _choose(logits, [width], [top_p], None, min_keep).candidates


def choose_candidates(
    logits: Tensor,  # [rows, vocab] any float
    configs: Sequence[GuidanceConfig],
    min_keep: int = 1,
) -> TopCandidates:
    """`select_candidates` by each row's own config, and the rows that their gates let pass.

    One selection, as wide as the largest top_k: int64 [rows, largest k], padded with -1. A gate
    lets a row pass whose top token has at least that probability; the answer's `gated` is None
    where no row has one. No wait for the device.
    """
    vocab = logits.shape[-1]
    if len(set(map(id, configs))) == 1:
        configs = [configs[0]]
    gates = None
    if any(config.gate is not None for config in configs):
        gates = [torch.inf if config.gate is None else config.gate for config in configs]
    widths = [vocab if config.top_k is None else config.top_k for config in configs]
    return _choose(logits, widths, [config.top_p for config in configs], gates, min_keep)


def log_normaliser(logits: Tensor) -> Tensor:
    """log Σ exp(l) over the vocabulary, float32 [rows, 1]."""
    return torch.logsumexp(logits.float(), -1, keepdim=True)


def gated_rows(logits: Tensor, gates: Sequence[float]) -> Tensor:
    """Rows whose top token has probability of at least the row's gate, bool [rows]."""
    gated = _choose(logits, [1] * len(logits), [1.0], gates, 1).gated
    assert gated is not None
    return gated


def rows_beyond(
    logits: Tensor,  # [rows, vocab] any float
    known: int,
) -> list[int]:
    """The rows whose largest logit is at an id that is not below `known`."""
    found = beyond(logits, known)
    rows: list[int] = [] if found is None else found.nonzero().flatten().tolist()
    return rows


def beyond(logits: Tensor, known: int) -> Tensor | None:
    """The same as bool [rows] without a wait for the device; None where no id can be."""
    if logits.shape[-1] <= known:
        return None
    return logits[:, known:].amax(-1) > logits[:, :known].amax(-1)


def _choose(
    logits: Tensor,
    widths: Sequence[int],
    top_p: Sequence[float],
    gates: Sequence[float] | None,
    min_keep: int,
) -> TopCandidates:
    """One selection, as wide as the widest row. widths, top_p, gates: one a row, or one for all."""
    vocab, width = logits.shape[-1], max(widths, default=1)
    if width > vocab:
        raise ValueError(
            f"top_k={width} is larger than the vocabulary of {vocab} tokens: "
            f"expected at most {vocab}, or None for all of it"
        )
    rows, device = len(logits), logits.device
    ragged = min(widths, default=width) < width
    # The mass of all candidates may round to 1 before the last one: 1 cuts nothing.
    cuts = [p if p < 1.0 else torch.inf for p in top_p]
    return top_candidates(
        logits,
        width,
        top_k=_column(widths, rows, torch.int64, device) if ragged else None,
        top_p=_column(cuts, rows, torch.float32, device) if min(cuts, default=1.0) < 1.0 else None,
        gate=None if gates is None else _column(gates, rows, torch.float32, device),
        min_keep=min_keep,
    )


def _column(
    numbers: Sequence[float], rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The numbers, or one of them for all rows, on the device: [rows]."""
    return _kept(tuple(numbers) if len(numbers) == rows else (numbers[0],) * rows, dtype, device)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Steps repeat themselves: what goes to the device stays there."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
