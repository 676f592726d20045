"""The candidates of a row, however they are found: larger logits first, ties to the lower id."""

import pytest
import torch

from guided_decode.candidates import _by_keys, _by_repair


def logits_of(kind, rows, vocab):
    logits = torch.randn(rows, vocab) * 3
    if kind == "ties":
        return logits.round()
    if kind == "signed zeros":
        return torch.where(logits < 0, -0.0, 0.0)
    if kind == "masked":
        return logits.masked_fill(logits < 2, -torch.inf)
    return logits.to(kind)


@pytest.mark.parametrize("select", [_by_keys, _by_repair])
@pytest.mark.parametrize(
    "kind", ["ties", "signed zeros", "masked", torch.float32, torch.bfloat16, torch.float16]
)
def test_candidates_are_ordered_by_logit_and_then_by_id(select, kind):
    torch.manual_seed(0)
    for rows, vocab in [(1, 1), (3, 17), (4, 301)]:
        logits = logits_of(kind, rows, vocab)
        for k in {1, min(8, vocab), vocab - 1, vocab} - {0}:
            for row, chosen in zip(logits.tolist(), select(logits, k).tolist(), strict=True):
                ordered = sorted(range(vocab), key=lambda token, row=row: (-row[token], token))[:k]
                # Which of the tokens at −inf are named is left open: none is a candidate.
                alive = [token for token in ordered if row[token] > -float("inf")]
                assert chosen[: len(alive)] == alive
                assert len(set(chosen)) == k
