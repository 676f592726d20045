"""Rows that cannot be guided: why, and in which words; and what no row survives."""

import logging
from collections.abc import Collection

import torch
from torch import Tensor

from guided_decode.scorer import Scorer

logger = logging.getLogger("guided_decode")

# Beside the kernel's own reasons: a row that has no token left.
ALL_MASKED = -1


def reasons(
    why: Tensor,  # [rows] int32, the kernel's; 0 where nothing failed
    candidates: Tensor,  # [rows, k] int64, -1 where padded; on the host or where `why` is
) -> list[int]:
    """Why each row failed, 0 where it did not; one copy from the device."""
    if candidates.device.type != "cpu":
        return torch.where(candidates[:, 0] < 0, ALL_MASKED, why).tolist()
    empty = candidates.numpy()[:, 0] < 0
    if not empty.any():
        return why.tolist()
    return [ALL_MASKED if e else each for each, e in zip(why.tolist(), empty, strict=True)]


def in_words(rows: Collection[int], *, masked: Collection[int]) -> str:
    """What a caller is told of failed rows, of which some came with every token masked."""
    if masked:
        return (
            f"rows {list(masked)} came with every logit at -inf, so no token is left to sample: "
            "expected at least one; look for what masks them all before guidance (another logits "
            "processor, banned or allowed tokens, a grammar)"
        )
    return (
        f"the scorer answered NaN or infinity for rows {list(rows)}, or so much that their "
        "logits overflow: expected finite values"
    )


def count(scorer: Scorer, rows: int, reason: object) -> None:
    """Counts rows that go on without the scorer; the first time it says why."""
    if scorer.stats.passthroughs == 0:
        logger.warning("rows go on unguided because scoring failed: %s", reason)
    scorer.stats.add(passthroughs=rows)


def no_value(rows: int, of: int) -> str:
    """What a caller is told of prefixes whose value is no number."""
    return (
        f"the scorer answered NaN or infinity as the value of {rows} of {of} prefixes: expected "
        "finite values"
    )


def is_device_error(error: Exception) -> bool:
    """Whether the device itself failed, which nothing on it survives."""
    accelerator = getattr(torch, "AcceleratorError", None)
    return accelerator is not None and isinstance(error, accelerator)
