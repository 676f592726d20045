"""The guidance rule: advantages to logits. The one place where the formula meets its settings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from guided_decode.candidates import select_candidates
from guided_decode.config import GuidanceConfig
from guided_decode.kernels import guide_logits
from guided_decode.scores import Scores

__all__ = ["guide", "select_candidates", "unusable_rows"]

Configs = GuidanceConfig | Sequence[GuidanceConfig]


def guide(
    logits: Tensor,  # [rows, vocab] any float
    candidates: Tensor,  # [rows, k] int64, -1 where padded
    scores: Scores,
    config: Configs,
    *,
    exempt: Tensor | None = None,  # [rows, k] bool
    log_ratio: Tensor | None = None,  # [rows, k] float32
    active: Tensor | None = None,  # [rows] bool
) -> Tensor:
    """Guided logits, by section 2 of the design.

        A(s,a) = Q(s,a) − V(s) − kl_coef · (log π(a|s) − log π_ref(a|s))
        reweight:  l'(a) = l(a) + beta · A(s,a)
        prune:     l'(a) = l(a) if A(s,a) ≥ max A − margin, else −inf
        outside the candidates: −inf (tail="mask") or l(a) (tail="keep")

    Args:
        logits: [rows, vocab]; not changed.
        candidates: int64 [rows, k], distinct within a row, padded with -1.
        scores: values float32 [rows, k] (Q) and baseline float32 [rows] (V of the prefix).
        config: one GuidanceConfig, or one a row.
        exempt: bool [rows, k]; candidates with A = 0 that are neither pruned nor counted in max A
            (terminals, where the critic was never trained on them).
        log_ratio: float32 [rows, k], log π − log π_ref; needed where kl_coef is not 0.
        active: bool [rows]; False gives A = 0 for the row's every candidate, as the gate does.

    Returns:
        New logits, [rows, vocab], of the input's dtype.

    Raises:
        ValueError: shapes differ; kl_coef without log_ratio; a score that is used is not finite.
    """
    configs = per_row(config, len(logits))
    _check_shapes(logits, candidates, scores)
    bad = unusable_rows(
        candidates, scores, configs, exempt=exempt, log_ratio=log_ratio, active=active
    )
    if bad.any():
        raise ValueError(
            f"the scores of rows {bad.nonzero().flatten().tolist()[:8]} are NaN or infinite: "
            "expected finite values for every candidate that is neither padded nor exempt"
        )
    guided = apply_guidance(
        logits.clone(),
        candidates,
        scores,
        configs,
        exempt=exempt,
        log_ratio=log_ratio,
        active=active,
    )
    bad = overflowed_rows(logits, guided, candidates, configs)
    if bad.any():
        raise ValueError(
            f"the guided logits of rows {bad.nonzero().flatten().tolist()[:8]} are beyond "
            f"{logits.dtype}: expected a smaller beta or smaller scores"
        )
    return guided


def apply_guidance(
    logits: Tensor,
    candidates: Tensor,
    scores: Scores,
    configs: Sequence[GuidanceConfig],
    *,
    exempt: Tensor | None = None,
    log_ratio: Tensor | None = None,
    active: Tensor | None = None,
    min_keep: int = 1,
) -> Tensor:
    """`guide` in place, for scores that are known to be usable.

    Arguments as there; min_keep: how many scored candidates "prune" leaves at least.
    """
    device = logits.device
    weights = torch.tensor(
        [[c.beta * (c.rule == "reweight"), _margin(c), c.kl_coef] for c in configs],
        dtype=torch.float32,
    )
    flags = torch.tensor([[c.tail == "keep", c.baseline == "mean"] for c in configs])
    weights, flags = weights.to(device, non_blocking=True), flags.to(device, non_blocking=True)
    penalty = None if log_ratio is None else weights[:, 2:] * log_ratio.nan_to_num(0.0)
    return guide_logits(
        logits,
        candidates,
        scores.values,
        scores.baseline,
        beta=weights[:, 0],
        margin=weights[:, 1],
        keep_tail=flags[:, 0],
        mean_baseline=flags[:, 1],
        scored=_scored(candidates, exempt, active),
        penalty=penalty,
        min_keep=min_keep,
    )


def unusable_rows(
    candidates: Tensor,
    scores: Scores,
    config: Configs,
    *,
    exempt: Tensor | None = None,
    log_ratio: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Rows in which a number that guidance would use is NaN or infinite, bool [rows]."""
    configs = per_row(config, len(candidates))
    scored = _scored(candidates, exempt, active)
    bad = ~torch.isfinite(scores.values)
    if any(c.kl_coef for c in configs):
        if log_ratio is None:
            raise ValueError("kl_coef is not 0 but no log_ratio was given: pass log π − log π_ref")
        penalised = torch.tensor([c.kl_coef != 0 for c in configs])
        penalised = penalised.to(candidates.device, non_blocking=True)
        bad |= penalised[:, None] & ~torch.isfinite(log_ratio)
    return (bad & scored).any(-1) | (scored.any(-1) & ~torch.isfinite(scores.baseline))


def overflowed_rows(
    logits: Tensor, guided: Tensor, candidates: Tensor, configs: Sequence[GuidanceConfig]
) -> Tensor:
    """Rows in which finite numbers gave a logit that no dtype holds, bool [rows]."""
    index = candidates.clamp(min=0)
    before, after = logits.gather(-1, index), guided.gather(-1, index)
    # Pruning alone gives −inf.
    pruned = torch.tensor([c.rule == "prune" for c in configs])
    pruned = pruned.to(logits.device, non_blocking=True)[:, None]
    broken = ~torch.isfinite(after) & ~(pruned & (after == -torch.inf))
    return (broken & torch.isfinite(before) & (candidates >= 0)).any(-1)


def per_row(config: Configs, rows: int) -> Sequence[GuidanceConfig]:
    """One config for each row."""
    if isinstance(config, GuidanceConfig):
        return [config] * rows
    if len(config) != rows:
        raise ValueError(f"{len(config)} configs came for {rows} rows: pass one, or one a row")
    return config


def _margin(config: GuidanceConfig) -> float:
    return float("inf") if config.margin is None else config.margin


def _scored(candidates: Tensor, exempt: Tensor | None, active: Tensor | None) -> Tensor:
    scored = candidates >= 0
    if exempt is not None:
        scored &= ~exempt
    if active is not None:
        scored &= active[:, None]
    return scored


def _check_shapes(logits: Tensor, candidates: Tensor, scores: Scores) -> None:
    given = [list(logits.shape), list(candidates.shape), list(scores.values.shape)]
    given.append(list(scores.baseline.shape))
    rows, k = logits.shape[0], candidates.shape[-1]
    if given[1:] != [[rows, k], [rows, k], [rows]]:
        raise ValueError(
            f"logits, candidates, values and baseline came with shapes {given}: expected "
            "[rows, vocab], [rows, k], [rows, k] and [rows]"
        )
    if candidates.numel() and int(candidates.max()) >= logits.shape[-1]:
        raise ValueError(
            f"candidate {int(candidates.max())} is outside the vocabulary of "
            f"{logits.shape[-1]} tokens"
        )
