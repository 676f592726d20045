"""One decoding step for many rows: candidates, gate, scores, guided logits."""

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from guided_decode.candidates import gated_rows, log_normaliser, select_candidates_per_row
from guided_decode.config import GuidanceConfig, OnError
from guided_decode.guidance import (
    Configs,
    apply_guidance,
    overflowed_rows,
    per_row,
    unusable_rows,
)
from guided_decode.scores import Prefix, Scorer, Scores
from guided_decode.terminal import score_candidates

# Token ids that would end any of the rows, or one collection of them a row.
Terminals = Collection[int] | Sequence[Collection[int]]

logger = logging.getLogger("guided_decode")


class _StepScores(NamedTuple):
    scores: Scores
    exempt: Tensor | None
    log_ratio: Tensor | None


def guide_rows(
    scorer: Scorer,
    logits: Tensor,  # [rows, vocab] any float
    prefixes: Sequence[Prefix],
    config: Configs,
    *,
    terminals: Terminals = (),
    on_error: OnError = "raise",
    min_keep: int = 1,
) -> Tensor:
    """Guided next-token logits of live rows.

    Args:
        scorer: what scores the candidates.
        logits: [rows, vocab], before temperature and truncation; not changed.
        prefixes: a row's unpadded token ids (prompt and what was generated), or its handle.
        config: one GuidanceConfig, or one a row.
        terminals: token ids that would end these requests, or one collection of them a row.
        on_error: what a scorer that fails, refuses a row, or answers NaN or infinity, does:
            "raise", or "passthrough", which hands those rows' logits on untouched, counts them,
            and logs once. A row that is refused does not keep the others from being scored.
        min_keep: how many candidates top_p and pruning leave at least (beam search needs some).

    Returns:
        New logits, [rows, vocab], of the input's dtype.

    Raises:
        ValueError: top_k=None with a scorer that scores candidates one by one, kl_coef without a
            reference, another number of prefixes than rows; with on_error="raise" also a score
            that is NaN or infinite.
    """
    configs = per_row(config, len(logits))
    _check_call(logits, prefixes, on_error)
    for each in set(configs):
        _check_supported(scorer, each)
    if all(not c.needs_scores and c.tail == "keep" for c in configs):
        return logits.clone()
    ends = _per_row_terminals(terminals, len(logits))
    candidates = _candidates(logits, configs, min_keep)
    active = _rows_to_score(scorer, logits, configs)
    reason: object = "NaN or infinite scores"
    refused: dict[int, str] = {}
    try:
        try:
            step = _score(scorer, logits, candidates, prefixes, configs, active, ends)
        except ValueError:
            refused = _refused_rows(scorer, prefixes, candidates, active, logits.shape[-1])
            if on_error == "raise" or not refused:
                raise
            active = [i for i in active if i not in refused]
            step = _score(scorer, logits, candidates, prefixes, configs, active, ends)
    except Exception as error:
        if on_error == "raise" or is_device_error(error):
            raise
        reason, step = error, _no_scores(candidates)
    guided, failed = _apply(logits, candidates, configs, active, step, min_keep)
    if failed and on_error == "raise":
        raise ValueError(
            f"the scorer answered NaN or infinity for rows {failed}, or so much that their "
            "logits overflow: expected finite values"
        )
    if failed or refused:
        untouched = [*failed, *refused]
        _count_failure(scorer, len(untouched), next(iter(refused.values()), reason))
        guided[untouched] = logits[untouched]
    return guided


def _check_call(logits: Tensor, prefixes: Sequence[Prefix], on_error: OnError) -> None:
    if on_error not in ("raise", "passthrough"):
        raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'passthrough'")
    if len(prefixes) != len(logits):
        raise ValueError(
            f"{len(prefixes)} prefixes came with logits of {len(logits)} rows: expected one a row"
        )


def _check_supported(scorer: Scorer, config: GuidanceConfig) -> None:
    if config.top_k is None and config.needs_scores and not scorer.scores_vocabulary:
        raise ValueError(
            f"top_k=None was given with {type(scorer).__name__}, which forwards every candidate: "
            "pass a top_k (the whole vocabulary is for implicit rewards only)"
        )
    if config.kl_coef and scorer.reference is None:
        raise ValueError(
            f"kl_coef={config.kl_coef:g} was given without a reference model: "
            "pass load_scorer(..., reference=...)"
        )


def _per_row_terminals(terminals: Terminals, rows: int) -> Sequence[Collection[int]]:
    shared = [each for each in terminals if not isinstance(each, Collection)]
    if shared or not terminals:
        return [shared] * rows
    each_row = [each for each in terminals if isinstance(each, Collection)]
    if len(each_row) != rows:
        raise ValueError(
            f"terminals came for {len(each_row)} rows with logits of {rows}: expected token ids, "
            "or one collection of them a row"
        )
    return each_row


def _candidates(logits: Tensor, configs: Sequence[GuidanceConfig], min_keep: int) -> Tensor:
    """Candidates by each row's own top_k and top_p, int64 [rows, largest k]."""
    if len({(c.top_k, c.top_p) for c in configs}) == 1:
        configs = configs[:1]
    top_k, top_p = [c.top_k for c in configs], [c.top_p for c in configs]
    return select_candidates_per_row(logits, top_k, top_p, min_keep)


def _refused_rows(
    scorer: Scorer, prefixes: Sequence[Prefix], candidates: Tensor, active: list[int], vocab: int
) -> dict[int, str]:
    """The rows that the scorer would refuse, with its reasons."""
    counts = (candidates >= 0).sum(-1).tolist()
    reasons = ((i, scorer.refusal(prefixes[i], counts[i])) for i in active)
    refused = {i: reason for i, reason in reasons if reason is not None}
    if vocab > scorer.vocab_size:
        unknown = (candidates >= scorer.vocab_size).any(-1).tolist()
        reason = f"a candidate is outside the scorer's vocabulary of {scorer.vocab_size} tokens"
        refused.update({i: reason for i in active if unknown[i]})
    return refused


def _rows_to_score(scorer: Scorer, logits: Tensor, configs: Sequence[GuidanceConfig]) -> list[int]:
    """Indices of the rows whose advantages matter and that their gate does not let pass."""
    wanted = [i for i, c in enumerate(configs) if c.needs_scores]
    gates = {i: gate for i in wanted if (gate := configs[i].gate) is not None}
    passed: set[int] = set()
    if gates:
        hits = gated_rows(logits[list(gates)], list(gates.values())).tolist()
        passed = {i for i, hit in zip(gates, hits, strict=True) if hit}
    scorer.stats.rows_gated += len(passed)
    return [i for i in wanted if i not in passed]


def _score(
    scorer: Scorer,
    logits: Tensor,
    candidates: Tensor,
    prefixes: Sequence[Prefix],
    configs: Sequence[GuidanceConfig],
    active: list[int],
    terminals: Sequence[Collection[int]],
) -> _StepScores:
    """Scores of the active rows, spread over all rows; NaN elsewhere."""
    step = _no_scores(candidates)
    if not active:
        return step._replace(log_ratio=torch.zeros_like(step.scores.values))
    device = candidates.device
    rows: Tensor | slice = slice(None)
    if len(active) < len(candidates):
        rows = torch.tensor(active).to(device, non_blocking=True)
    chosen, own = candidates[rows], [prefixes[i] for i in active]
    ends = [terminals[i] for i in active]
    scores, exempt = score_candidates(scorer, own, chosen, ends)
    step.scores.values[rows] = scores.values.to(device)
    step.scores.baseline[rows] = scores.baseline.to(device)
    if exempt is not None:
        spread = torch.zeros_like(candidates, dtype=torch.bool)
        spread[rows] = exempt.to(device)
        step = step._replace(exempt=spread)
    if any(configs[i].kl_coef for i in active):
        assert scorer.reference is not None
        policy = logits[rows].gather(-1, chosen.clamp(min=0)).float() - log_normaliser(logits[rows])
        ratio = torch.full_like(step.scores.values, torch.nan)
        ratio[rows] = policy - scorer.reference.log_probs(own, chosen).to(device)
        step = step._replace(log_ratio=ratio)
    return step


def _no_scores(candidates: Tensor) -> _StepScores:
    """NaN for every candidate: what a row has that was not scored."""
    values = torch.full(candidates.shape, torch.nan, dtype=torch.float32, device=candidates.device)
    return _StepScores(Scores(values, values.new_full((len(values),), torch.nan)), None, None)


def _apply(
    logits: Tensor,
    candidates: Tensor,
    configs: Sequence[GuidanceConfig],
    active: list[int],
    step: _StepScores,
    min_keep: int,
) -> tuple[Tensor, list[int]]:
    """Guided logits, and the rows whose scores could not be used."""
    scores, exempt, log_ratio = step
    if log_ratio is None and any(c.kl_coef for c in configs):
        log_ratio = torch.full_like(scores.values, torch.nan)
    here = set(active)
    live = torch.tensor([i in here for i in range(len(logits))])
    live = live.to(logits.device, non_blocking=True)
    failed = unusable_rows(
        candidates, scores, configs, exempt=exempt, log_ratio=log_ratio, active=live
    )
    guided = apply_guidance(
        logits.clone(),
        candidates,
        scores,
        configs,
        exempt=exempt,
        log_ratio=log_ratio,
        active=live & ~failed,
        min_keep=min_keep,
    )
    failed |= overflowed_rows(logits, guided, candidates, configs)
    return guided, failed.nonzero().flatten().tolist()


def _count_failure(scorer: Scorer, rows: int, reason: object) -> None:
    if scorer.stats.passthroughs == 0:
        logger.warning("rows go on unguided because scoring failed: %s", reason)
    scorer.stats.passthroughs += rows


def is_device_error(error: Exception) -> bool:
    """Whether the device itself failed, which nothing on it survives."""
    accelerator = getattr(torch, "AcceleratorError", None)
    return accelerator is not None and isinstance(error, accelerator)
