"""The guidance rule: advantages to logits. The one place where the formula meets its settings."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from guided_decode.guidance.candidates import select_candidates
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.kernels import guide_logits
from guided_decode.kernels.candidate_shift import OVERFLOWED, UNUSABLE, candidate_advantages
from guided_decode.kernels.guide_logits import GuidedLogits
from guided_decode.scorer import Scores

__all__ = ["guide", "select_candidates"]

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
    """Guided logits, by the rule of value-guided decoding.

    Q(s,a) = V(s·a) is what the scorer expects after candidate a, V(s) what it expected before it:

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
    check_tensors(logits=logits, candidates=candidates, values=scores[0], baseline=scores[1])
    scores = Scores(*scores)
    configs = per_row(config, len(logits))
    _check_shapes(logits, candidates, scores)
    scored = scored_candidates(candidates, exempt, active)
    guided, failed = apply_guidance(logits, candidates, scores, configs, scored, log_ratio)
    why = failed.tolist()
    if UNUSABLE in why:
        raise ValueError(
            f"the scores of rows {_rows_of(UNUSABLE, why)} are NaN or infinite: "
            "expected finite values for every candidate that is neither padded nor exempt"
        )
    if OVERFLOWED in why:
        raise ValueError(
            f"the guided logits of rows {_rows_of(OVERFLOWED, why)} are beyond "
            f"{logits.dtype}: expected a smaller beta or smaller scores"
        )
    return guided


def apply_guidance(
    logits: Tensor,  # [rows, vocab] any float
    candidates: Tensor,  # [rows, k] int64
    scores: Scores,
    configs: Sequence[GuidanceConfig],
    scored: Tensor,  # [rows, k] bool
    log_ratio: Tensor | None = None,  # [rows, k] float32
    min_keep: int = 1,
    *,
    padded: bool = True,
) -> GuidedLogits:
    """`guide` without a wait for the device: which rows failed is left to the caller.

    Arguments as there, and scored: which candidates have an advantage; min_keep: how many of them
    "prune" leaves at least; padded: False where no candidate is padding, which costs less.

    Raises ValueError: kl_coef without log_ratio.
    """
    rules = _rules_of(configs, logits.device)
    penalty = _penalty(rules, log_ratio)
    return guide_logits(
        logits,
        candidates,
        scores.values,
        scores.baseline,
        beta=rules.beta,
        margin=rules.margin,
        keep_tail=rules.keep_tail,
        mean_baseline=rules.mean_baseline,
        scored=scored,
        penalty=penalty,
        min_keep=min_keep,
        usual=rules.usual and not padded,
    )


def advantages(
    scores: Scores,
    configs: Sequence[GuidanceConfig],
    scored: Tensor,  # [rows, k] bool
    log_ratio: Tensor | None = None,  # [rows, k] float32
) -> Tensor:
    """A(s,a) as the rule reads it, float32 [rows, k]; 0 where a candidate is not scored.

    Arguments as of `apply_guidance`. Raises ValueError: kl_coef without log_ratio.
    """
    rules = _rules_of(configs, scored.device)
    found = candidate_advantages(
        scores.values, scores.baseline, rules.mean_baseline, scored, _penalty(rules, log_ratio)
    )
    return found.masked_fill(~scored, 0.0)


def scored_candidates(
    candidates: Tensor, exempt: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """The candidates that have an advantage, bool [rows, k]; arguments as of `guide`."""
    scored = candidates >= 0
    if exempt is not None:
        scored &= ~exempt
    if active is not None:
        scored &= active[:, None]
    return scored


class _Rules(NamedTuple):
    """The rows' configs as tensors [rows]; kl_coef is None where it is 0 for all. usual: as of
    `guide_logits`."""

    beta: Tensor
    margin: Tensor
    keep_tail: Tensor
    mean_baseline: Tensor
    kl_coef: Tensor | None
    usual: bool


def distinct(configs: Sequence[GuidanceConfig]) -> set[GuidanceConfig]:
    """The rows' different configs; most rows share one object, which is looked at once."""
    return set(dict(zip(map(id, configs), configs, strict=True)).values())


def objects_that(
    configs: Sequence[GuidanceConfig], asked: Callable[[GuidanceConfig], object]
) -> set[int]:
    """The ids of the rows' config objects of which something is true, each asked once."""
    objects = dict(zip(map(id, configs), configs, strict=True))
    return {key for key, config in objects.items() if asked(config)}


def _rules_of(configs: Sequence[GuidanceConfig], device: torch.device) -> _Rules:
    if len(distinct(configs)) == 1:
        return _rules_of_all(configs[0], len(configs), device)
    return _rules(configs, device)


def _penalty(rules: _Rules, log_ratio: Tensor | None) -> Tensor | None:
    """What the KL term takes from each advantage, float32 [rows, k]; None where no row has one."""
    if rules.kl_coef is None:
        return None
    if log_ratio is None:
        raise ValueError("kl_coef is not 0 but no log_ratio was given: pass log π − log π_ref")
    # A row without the term has no log-ratio either.
    weight = rules.kl_coef[:, None]
    return torch.where(weight != 0, weight * log_ratio, 0.0)


@functools.lru_cache(maxsize=256)
def _rules_of_all(config: GuidanceConfig, rows: int, device: torch.device) -> _Rules:
    """Steps repeat themselves: what goes to the device stays there."""
    return _rules([config] * rows, device)


@torch.inference_mode(False)
def _rules(configs: Sequence[GuidanceConfig], device: torch.device) -> _Rules:
    rows = len(configs)
    # Each begins at a multiple of 16 bytes, whatever the rows: kernels are compiled for that.
    # float32, whatever the caller's default dtype is.
    weights = torch.zeros(3, -(-rows // 16) * 16, dtype=torch.float32)
    weights[:, :rows] = torch.tensor(
        [[c.beta * (c.rule == "reweight"), _margin(c), c.kl_coef] for c in configs],
        dtype=torch.float32,
    ).T
    flags = torch.zeros(2, weights.shape[1], dtype=torch.bool)
    flags[:, :rows] = torch.tensor([[c.tail == "keep", c.baseline == "mean"] for c in configs]).T
    beta, margin, kl_coef = weights.to(device, non_blocking=True)[:, :rows]
    keep_tail, mean_baseline = flags.to(device, non_blocking=True)[:, :rows]
    has_kl = any(c.kl_coef for c in configs)
    usual = all(
        c.rule == "reweight" and c.beta and c.baseline == "prefix" and c.tail == "mask"
        for c in configs
    )
    return _Rules(beta, margin, keep_tail, mean_baseline, kl_coef if has_kl else None, usual)


def _rows_of(reason: int, why: list[int]) -> list[int]:
    return [row for row, each in enumerate(why) if each == reason][:8]


def per_row(config: Configs, rows: int) -> Sequence[GuidanceConfig]:
    """One config for each row.

    Raises ValueError: anything but one GuidanceConfig, or one a row.
    """
    if isinstance(config, GuidanceConfig):
        return [config] * rows
    odd = [each for each in config if not isinstance(each, GuidanceConfig)] if isinstance(
        config, Sequence) else [config]  # fmt: skip
    if odd:
        raise ValueError(
            f"a {type(odd[0]).__name__} came as a config: expected a GuidanceConfig, or one a row"
        )
    if len(config) != rows:
        raise ValueError(f"{len(config)} configs came for {rows} rows: pass one, or one a row")
    return config


def check_tensors(**given: object) -> None:
    """Raises ValueError: one of them is no tensor."""
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise ValueError(
                f"{name} came as {type(each).__name__}: expected a tensor; wrap it in torch.tensor"
            )


def _margin(config: GuidanceConfig) -> float:
    return float("inf") if config.margin is None else config.margin


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
