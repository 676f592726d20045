"""A scorer without a model, as an author may write one: values of ids by arithmetic, no cache."""

from __future__ import annotations

import math

import torch

from guided_decode import Scores
from guided_decode.prefix import PrefixHandle, as_ints
from guided_decode.stats import ScorerStats

VOCAB, BOS, EOS = 61, 1, 2


def value_of(ids) -> float:
    """Any function of the ids will do, in which each id and its place matter."""
    return sum(math.sin(0.7 * token + 1.3 * place) for place, token in enumerate(ids))


class PlainScorer:
    """V of a prefix by a function of its ids."""

    vocab_size = VOCAB
    terminal = "critic"
    bos_token_id, eos_token_id = BOS, EOS
    reward = reference = None
    scores_vocabulary = False

    def __init__(self, function=value_of):
        self.stats = ScorerStats()
        self.function = function

    def score(self, prefixes, candidates):
        self.check(prefixes, candidates)
        rows = [self.read(prefix) for prefix in prefixes]
        scores = self.answer(rows, candidates)
        self.stats.add(rows_scored=len(rows))
        return scores

    def refusal(self, prefix, candidates):
        try:
            self.check([prefix], torch.zeros(1, 1, dtype=torch.int64))
        except ValueError as error:
            return str(error)
        return None

    # What the broken ones change.

    def check(self, prefixes, candidates):
        if candidates.is_floating_point() or candidates.shape[0] != len(prefixes):
            raise ValueError(f"candidates {list(candidates.shape)} of {candidates.dtype}")
        for prefix in prefixes:
            ids = prefix.tokens if isinstance(prefix, PrefixHandle) else as_ints(prefix)
            if not len(ids) or ids.min() < 0 or ids.max() >= VOCAB:
                raise ValueError("a prefix that is empty, or outside the vocabulary")
        if candidates.numel() and candidates.max() >= VOCAB:
            raise ValueError("a candidate outside the vocabulary")

    def read(self, prefix):
        ids = prefix.tokens if isinstance(prefix, PrefixHandle) else as_ints(prefix)
        return tuple(ids.tolist())

    def answer(self, rows, candidates):
        values = [
            [self.value(ids, token) for token in own]
            for ids, own in zip(rows, candidates.tolist(), strict=True)
        ]
        baseline = [self.function(ids) for ids in rows]
        return Scores(
            torch.tensor(values, dtype=torch.float32).reshape(candidates.shape),
            torch.tensor(baseline, dtype=torch.float32),
        )

    def value(self, ids, token):
        return math.nan if token < 0 else self.function((*ids, token))
