"""Judges: a scorer, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from guided_decode.guidance.terminal import score_candidates
from guided_decode.scorer import Scorer
from guided_decode.search.requests import Judged
from guided_decode.search.response_ratios import ResponseRatios
from guided_decode.stats import ScorerStats


def is_ended(text: Judged, terminals: Collection[int]) -> bool:
    """Whether a response is finished, and by a token that ends responses."""
    return bool(text.finished and text.response and text.response[-1] in terminals)


class ScorerJudge:
    """What a scorer says of a response so far.

    Of an unfinished one, V at its last token. Of a finished one, what its end is worth by the
    scorer's terminal rule: a critic's V at the token before EOS, a reward model's score at EOS, or
    the reward model's beside a critic. Of an implicit reward, the sum over the response.
    """

    def __init__(self, scorer: Scorer, *, terminals: Collection[int] = ()) -> None:
        """
        Args:
            scorer: any scorer.
            terminals: token ids that end a response, beside the scorer's own EOS.
        """
        self.scorer = scorer
        own = () if scorer.eos_token_id is None else (scorer.eos_token_id,)
        self._terminals = sorted({*terminals, *own})
        self._ratios = ResponseRatios(scorer)

    @property
    def stats(self) -> ScorerStats:
        """Counters of the scorer."""
        return self.scorer.stats

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """As `requests.JudgeOfTexts.judge`. Raises ValueError: as the scorer."""
        if self.scorer.terminal == "included":
            return self._ratios.sums(texts)
        values = [0.0] * len(texts)
        at_end = [is_ended(text, self._terminals) for text in texts]
        ended = [i for i, end in enumerate(at_end) if end]
        open_ = [i for i, end in enumerate(at_end) if not end]
        if open_:
            whole = [texts[i].prompt + texts[i].response for i in open_]
            scores = self.scorer.score(whole, torch.empty(len(whole), 0, dtype=torch.int64))
            for i, value in zip(open_, scores.baseline.tolist(), strict=True):
                values[i] = value
        if ended:
            for i, value in zip(ended, self._at_the_end([texts[i] for i in ended]), strict=True):
                values[i] = value
        return values

    def _at_the_end(self, texts: Sequence[Judged]) -> list[float]:
        whole = [text.prompt + text.response for text in texts]
        last = torch.tensor([[ids[-1]] for ids in whole])
        scores, exempt = score_candidates(
            self.scorer, [ids[:-1] for ids in whole], last, [self._terminals] * len(whole)
        )
        values = scores.values[:, 0]
        if exempt is not None:
            values = torch.where(exempt[:, 0].to(values.device), scores.baseline, values)
        return values.tolist()


class CallableJudge:
    """A function of texts: rewards that a program computes, a remote model, ..."""

    def __init__(self, function: Callable[[Sequence[Judged]], Sequence[float]]) -> None:
        self._function = function

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """As `requests.JudgeOfTexts.judge`."""
        return [float(value) for value in self._function(texts)]
