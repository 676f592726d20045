"""One decoding step for many rows: candidates, gate, scores, guided logits."""

import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from guided_decode.guidance import failed_rows
from guided_decode.guidance.candidates import beyond, choose_candidates, log_normaliser
from guided_decode.guidance.config import GuidanceConfig, OnError
from guided_decode.guidance.failed_rows import is_device_error as is_device_error
from guided_decode.guidance.rule import (
    Configs,
    apply_guidance,
    check_tensors,
    distinct,
    objects_that,
    per_row,
    scored_candidates,
)
from guided_decode.guidance.terminal import score_candidates
from guided_decode.guidance.value_trail import (
    ValueTrail,
    check_has_values,
    keep_scores,
    open_rows,
)
from guided_decode.kernels.top_candidates import TopCandidates
from guided_decode.scorer import Prefix, Scorer, Scores

# Token ids that would end any of the rows, or one collection of them a row.
Terminals = Collection[int] | Sequence[Collection[int]]


class ObservedStep(NamedTuple):
    """What a step read and what it made of that, on the logits' device.

    candidates: int64 [rows, k], padded with -1. scores: values float32 [rows, k], baseline float32
    [rows]; NaN in a row that was not scored, as its gate has it. scored: bool [rows, k], the
    candidates that have an advantage. log_ratio: float32 [rows, k], log π − log π_ref, or None.
    guided: [rows, vocab], the logits that are handed on.
    """

    candidates: Tensor
    scores: Scores
    scored: Tensor
    log_ratio: Tensor | None
    guided: Tensor


class _StepScores(NamedTuple):
    """Scores of every row, and which candidates have an advantage, bool [rows, k]; a row that is
    not scored has NaN, and none."""

    scores: Scores
    scored: Tensor
    log_ratio: Tensor | None
    exempt: Tensor | None = None


def guide_rows(
    scorer: Scorer,
    logits: Tensor,  # [rows, vocab] any float
    prefixes: Sequence[Prefix],
    config: Configs,
    *,
    terminals: Terminals = (),
    on_error: OnError = "raise",
    min_keep: int = 1,
    observe: Callable[[ObservedStep], None] | None = None,
    trails: Sequence[ValueTrail] | None = None,
) -> Tensor:
    """Guided next-token logits of live rows.

    Args:
        scorer: what scores the candidates.
        logits: [rows, vocab], before temperature and truncation; not changed.
        prefixes: a row's unpadded token ids (prompt and what was generated), or its handle.
        config: one GuidanceConfig, or one a row.
        terminals: token ids that would end these requests, or one collection of them a row.
        on_error: what a scorer that fails, refuses a row, or answers NaN or infinity, and a row
            without a token left, does: "raise", or "passthrough", which hands those rows' logits on
            untouched, counts them, and logs once. A row that is refused does not keep the others
            from being scored.
        min_keep: how many candidates top_p and pruning leave at least (beam search needs some).
        observe: is told what the step read, and what came of it; one that is None costs nothing.
        trails: what is known of each row's values, and learnt here; value_gate_fall needs them.

    Returns:
        New logits, [rows, vocab], of the input's dtype. Ids beyond the scorer's vocabulary are no
        candidates, and count in no mass that top_p or the gate compares; a row whose likeliest
        token is one of them is a row that the scorer refuses.

    Raises:
        ValueError: top_k=None with a scorer that scores candidates one by one, kl_coef without a
            reference, another number of prefixes than rows; with on_error="raise" also a score
            that is NaN or infinite, and a guided row that comes with every logit at −inf.
    """
    check_tensors(logits=logits)
    configs = per_row(config, len(logits))
    _check_call(logits, prefixes, on_error)
    for each in distinct(configs):
        _check_supported(scorer, each)
    for trail in trails or ():
        trail.begin_step()
    if observe is None and not any(config.guides for config in configs):
        return logits.clone()
    ends = _per_row_terminals(terminals, len(logits))
    # A policy's vocabulary may be padded further than the scorer's: those ids are no candidates.
    chosen = choose_candidates(logits[:, : scorer.vocab_size], configs, min_keep)
    with _expecting(scorer, prefixes, configs):
        return _guided(
            scorer, logits, chosen, prefixes, configs, ends, trails,
            on_error=on_error, min_keep=min_keep, observe=observe,
        )  # fmt: skip


def _expecting(
    scorer: Scorer, prefixes: Sequence[Prefix], configs: Sequence[GuidanceConfig]
) -> AbstractContextManager[object]:
    """While the device is still at the logits, a scorer that can begins with the prefixes."""
    expecting = getattr(scorer, "expecting", None)
    if expecting is None or not any(config.needs_scores for config in distinct(configs)):
        return nullcontext()
    return expecting(prefixes)


def _guided(
    scorer: Scorer,
    logits: Tensor,
    chosen: TopCandidates,
    prefixes: Sequence[Prefix],
    configs: Sequence[GuidanceConfig],
    ends: Sequence[Collection[int]],  # a row's terminals
    trails: Sequence[ValueTrail] | None,
    *,
    on_error: OnError,
    min_keep: int,
    observe: Callable[[ObservedStep], None] | None,
) -> Tensor:
    """`guide_rows` once its arguments are checked and candidates are chosen."""
    past = beyond(logits, scorer.vocab_size)
    known, gated, lost = _on_host(chosen, past, vocabulary=scorer.scores_vocabulary)
    # Of what stays on the device nobody asks.
    padded = known.device.type != "cpu" or bool((known.numpy() < 0).any())
    active = _rows_to_score(scorer, configs, gated)
    if lost:
        guided_and_lost = [i for i in lost if configs[i].guides]
        _refuse_lost(guided_and_lost, scorer, on_error)
        active = [i for i in active if i not in guided_and_lost]
    active = open_rows(scorer, prefixes, configs, active, trails, on_error)
    reason: object = "NaN or infinite scores"
    refused: dict[int, str] = {}
    try:
        try:
            step = _score(scorer, logits, chosen.candidates, known, prefixes, configs, active, ends)
        except ValueError:
            refused = _refused_rows(scorer, prefixes, known, active)
            if on_error == "raise" or not refused:
                raise
            rest = [i for i in active if i not in refused]
            step = _score(scorer, logits, chosen.candidates, known, prefixes, configs, rest, ends)
            step = _spoiled(step, chosen.candidates, list(refused))
            reason = next(iter(refused.values()))
    except Exception as error:
        if on_error == "raise" or is_device_error(error):
            raise
        reason, step = error, _spoiled(_no_scores(chosen.candidates), chosen.candidates, active)
    guided, why = apply_guidance(
        logits, chosen.candidates, step.scores, configs, step.scored, step.log_ratio, min_keep,
        padded=padded,
    )  # fmt: skip
    if lost:
        guided[lost] = logits[lost]
    if trails is not None:
        for i in active:
            trails[i].asked = i not in refused
        keep_scores(
            prefixes, trails, chosen.candidates, step.scores, step.scored, step.exempt, active
        )
    failures = failed_rows.reasons(why, known) if padded else why.tolist()
    failed = [i for i, each in enumerate(failures) if each and configs[i].guides and i not in lost]
    masked = [i for i in failed if failures[i] == failed_rows.ALL_MASKED]
    if failed and on_error == "raise":
        raise ValueError(failed_rows.in_words(failed, masked=masked))
    if failed:
        if failed == masked:
            reason = failed_rows.in_words(failed, masked=masked)
        failed_rows.count(scorer, len(failed), reason)
    if observe is not None:
        observe(ObservedStep(chosen.candidates, step.scores, step.scored, step.log_ratio, guided))
    return guided


def check_on_error(given: object) -> None:
    """Raises ValueError: no value of `on_error`."""
    if given not in get_args(OnError):
        raise ValueError(f"on_error={given!r}: expected 'raise' or 'passthrough'")


def _refuse_lost(lost: list[int], scorer: Scorer, on_error: OnError) -> None:
    """Counts guided rows whose likeliest token the scorer does not know, or raises ValueError."""
    if not lost:
        return
    reason = f"the likeliest token is outside the scorer's vocabulary of {scorer.vocab_size}"
    if on_error == "raise":
        raise ValueError(
            f"rows {lost}: {reason}: expected a scorer with the policy's vocabulary, or "
            'on_error="passthrough"'
        )
    failed_rows.count(scorer, len(lost), reason)


def _check_call(logits: Tensor, prefixes: Sequence[Prefix], on_error: OnError) -> None:
    check_on_error(on_error)
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
    check_has_values(scorer, config)
    if config.kl_coef and scorer.reference is None:
        raise ValueError(
            f"kl_coef={config.kl_coef:g} was given without a reference model: "
            "pass load_scorer(..., reference=...)"
        )


def _per_row_terminals(terminals: Terminals, rows: int) -> Sequence[Collection[int]]:
    classes = set(map(type, terminals))
    if not len(terminals) or not all(issubclass(each, Collection) for each in classes):
        return [[each for each in terminals if not isinstance(each, Collection)]] * rows
    each_row = cast(list[Collection[int]], list(terminals))
    if len(each_row) != rows:
        raise ValueError(
            f"terminals came for {len(each_row)} rows with logits of {rows}: expected token ids, "
            "or one collection of them a row"
        )
    return each_row


def _on_host(
    chosen: TopCandidates, past: Tensor | None, *, vocabulary: bool
) -> tuple[Tensor, list[bool] | None, list[int]]:
    """Candidates that are read on the host, which rows the gate lets pass, and which have their
    likeliest token beyond the scorer's vocabulary (`past`, bool [rows]): in one copy.

    vocabulary: candidates may be all there are, and stay where they are.
    """
    candidates, gated = chosen
    flags = [each for each in (gated, past) if each is not None]
    if not flags:
        return candidates if vocabulary else candidates.cpu(), None, []
    k = 0 if vocabulary else candidates.shape[1]
    every = torch.cat([candidates[:, :k], *(each[:, None] for each in flags)], -1).cpu()
    read = every[:, k:].bool().T.tolist()
    lost = [] if past is None else [i for i, found in enumerate(read[-1]) if found]
    return candidates if vocabulary else every[:, :k], None if gated is None else read[0], lost


def _refused_rows(
    scorer: Scorer, prefixes: Sequence[Prefix], candidates: Tensor, active: list[int]
) -> dict[int, str]:
    """The rows that the scorer would refuse, with its reasons."""
    counts = (candidates >= 0).sum(-1).tolist()
    reasons = ((i, scorer.refusal(prefixes[i], counts[i])) for i in active)
    return {i: reason for i, reason in reasons if reason is not None}


def _rows_to_score(
    scorer: Scorer, configs: Sequence[GuidanceConfig], gated: list[bool] | None
) -> list[int]:
    """Indices of the rows whose advantages matter and that their gate does not let pass."""
    needing = objects_that(configs, _needs_scores)
    wanted = [i for i, config in enumerate(configs) if id(config) in needing]
    if gated is None:
        return wanted
    rows = [i for i in wanted if not gated[i]]
    scorer.stats.add(rows_gated=len(wanted) - len(rows))
    return rows


_needs_scores = operator.attrgetter("needs_scores")


def _score(
    scorer: Scorer,
    logits: Tensor,
    candidates: Tensor,  # [rows, k] int64, where the logits are
    known: Tensor,  # the same where the scorer wants them
    prefixes: Sequence[Prefix],
    configs: Sequence[GuidanceConfig],
    active: list[int],
    terminals: Sequence[Collection[int]],
) -> _StepScores:
    """Scores of the active rows, spread over all rows; on the logits' device."""
    if not active:
        return _no_scores(candidates)
    every = len(active) == len(candidates)
    if not every:
        rows = torch.tensor(active)
        known = known[rows.to(known.device, non_blocking=True)]
        rows = rows.to(logits.device, non_blocking=True)
        prefixes, terminals = [prefixes[i] for i in active], [terminals[i] for i in active]
    scores, exempt = score_candidates(scorer, prefixes, known, terminals)
    scored = scored_candidates(known, exempt)
    log_ratio = None
    if any(configs[i].kl_coef for i in active):
        own, taken = (logits, candidates) if every else (logits[rows], candidates[rows])
        log_ratio = _log_ratio(scorer, own, taken, prefixes)
    values, baseline = (each.to(logits.device) for each in scores)
    if exempt is not None:
        exempt = exempt.to(logits.device, non_blocking=True)
    step = _StepScores(
        Scores(values, baseline), scored.to(logits.device, non_blocking=True), log_ratio, exempt
    )
    return step if every else _spread(step, rows, candidates)


def _log_ratio(
    scorer: Scorer, logits: Tensor, candidates: Tensor, prefixes: Sequence[Prefix]
) -> Tensor:
    """log π − log π_ref of each candidate, float32 [rows, k]."""
    assert scorer.reference is not None
    policy = logits.gather(-1, candidates.clamp(min=0)).float() - log_normaliser(logits)
    return policy - scorer.reference.log_probs(prefixes, candidates).to(logits.device)


def _no_scores(candidates: Tensor) -> _StepScores:
    """What rows have that are not scored."""
    values = torch.full(candidates.shape, torch.nan, dtype=torch.float32, device=candidates.device)
    baseline = values.new_full((len(values),), torch.nan)
    return _StepScores(Scores(values, baseline), values == 0, values)


def _spread(step: _StepScores, rows: Tensor, candidates: Tensor) -> _StepScores:
    """The step of some rows as one of all rows."""
    nothing = _no_scores(candidates)
    # Rows that are not scored may have a KL term.
    log_ratio = nothing.scores.values
    if step.log_ratio is not None:
        log_ratio = log_ratio.index_copy(0, rows, step.log_ratio)
    exempt = step.exempt
    if exempt is not None:
        exempt = nothing.scored.index_copy(0, rows, exempt)
    return _StepScores(
        Scores(
            nothing.scores.values.index_copy(0, rows, step.scores.values),
            nothing.scores.baseline.index_copy(0, rows, step.scores.baseline),
        ),
        nothing.scored.index_copy(0, rows, step.scored),
        log_ratio,
        exempt,
    )


def _spoiled(step: _StepScores, candidates: Tensor, rows: list[int]) -> _StepScores:
    """The step with rows whose scores are wanted and are NaN: guidance leaves those untouched."""
    at = torch.tensor(rows, dtype=torch.int64).to(candidates.device, non_blocking=True)
    return step._replace(scored=step.scored.index_copy(0, at, candidates[at] >= 0))
