"""One round of scoring: rows of several clients through one call of the scorer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guided_decode.scorer import Scorer
from guided_decode.scoring.remote.wire import REFERENCE, REWARD, SCORER
from guided_decode.serving.jobs import Slice

# Candidates a row beyond which others are not padded to as many: whole vocabularies, say.
_WIDE = 1024


def models_of(scorer: Scorer) -> dict[str, Any]:
    """The models of a scorer that clients may ask, by their names on the wire."""
    every = {SCORER: scorer, REWARD: scorer.reward, REFERENCE: scorer.reference}
    return {name: model for name, model in every.items() if model is not None}


def calls_of(
    models: Mapping[str, Any], slices: Sequence[Slice]
) -> Iterator[tuple[Any, list[Slice]]]:
    """The calls that rows need: one a model, and one for each of the rows that are too wide."""
    for name, model in models.items():
        own = [each for each in slices if each.job.target == name]
        wide = [each for each in own if each.job.candidates.shape[1] > _WIDE]
        narrow = [each for each in own if each.job.candidates.shape[1] <= _WIDE]
        for together in (narrow, *([each] for each in wide)):
            if together:
                yield model, together


def score_together(model: Any, slices: Sequence[Slice]) -> None:
    """Scores rows of one model in one call, and writes the answers into their jobs.

    Raises whatever the model raises: then none of these rows is answered.
    """
    rows = sum(s.stop - s.start for s in slices)
    width = max(s.job.candidates.shape[1] for s in slices)
    candidates = np.full((rows, width), -1, np.int64)
    prefixes, at = [], 0
    for job, start, stop in slices:
        k, end = job.candidates.shape[1], at + stop - start
        candidates[at:end, :k] = job.candidates[start:stop]
        prefixes += [prefix.tokens for prefix in job.prefixes[start:stop]]
        at = end
    values, baseline = _answers(model, prefixes, torch.from_numpy(candidates))
    at = 0
    for job, start, stop in slices:
        k, end = job.candidates.shape[1], at + stop - start
        job.values[start:stop] = values[at:end, :k]
        if baseline is not None:
            job.baseline[start:stop] = baseline[at:end]
        job.left -= stop - start
        at = end


def _answers(
    model: Any, prefixes: list[Any], candidates: torch.Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    # `isinstance` of a protocol takes longer than all else here.
    if not hasattr(model, "score"):
        return model.log_probs(prefixes, candidates).float().cpu().numpy(), None
    scores = model.score(prefixes, candidates)
    return scores.values.float().cpu().numpy(), scores.baseline.float().cpu().numpy()
