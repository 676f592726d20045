"""The repetition penalty by its formula, over the tokens that the installed transformers counts."""

import torch
import transformers
from packaging.version import Version
from transformers import LogitsProcessor

from tests import models

# Before, left padding counted as text.
IGNORES_PADDING = Version(transformers.__version__) >= Version("5.24")


class RepetitionPenalty(LogitsProcessor):
    """Logits of seen tokens, divided by the penalty where positive and multiplied elsewhere."""

    def __init__(self, penalty):
        self.penalty = penalty

    def __call__(self, input_ids, scores):
        penalised = scores.clone()
        for row, ids in zip(penalised, input_ids, strict=True):
            padding = (ids == models.PAD).int().cumprod(-1).sum() if IGNORES_PADDING else 0
            seen = ids[padding:].unique()
            own = row[seen]
            row[seen] = torch.where(own < 0, own * self.penalty, own / self.penalty)
        return penalised
