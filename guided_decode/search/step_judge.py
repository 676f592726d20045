"""A process reward model as a judge: of text, by the steps in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from guided_decode.scoring.step_scorer import StepScorer
from guided_decode.search.requests import Judged, Tokens
from guided_decode.search.response_text import ResponseText
from guided_decode.stats import ScorerStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StepJudge:
    """What a process reward model says of a response so far, by text, in its own format.

    The last step of an unfinished response is judged as it stands: let blocks end where its steps
    do (`Sampling.stop`).
    """

    # Methods that value single tokens are refused, as of `TextJudge`.
    through_text = True

    def __init__(
        self,
        scorer: StepScorer,
        tokenizer: PreTrainedTokenizerBase,
        prompt_of: Callable[[Tokens], str] | None = None,
    ) -> None:
        """
        Args:
            scorer: a process reward model.
            tokenizer: the policy's.
            prompt_of: the text in the model's own format, without BOS, of a prompt's token ids;
                None: what they say, where the policy is prompted in that format.
        """
        self.scorer = scorer
        self._tokenizer = tokenizer
        self._text = ResponseText(tokenizer)
        self._prompt_of = self._said if prompt_of is None else prompt_of

    @property
    def stats(self) -> ScorerStats:
        """Counters of the model's forwards."""
        return self.scorer.stats

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """As `requests.JudgeOfTexts.judge`. Raises ValueError: as the scorer."""
        # Without the bytes at a piece's end that are no character yet.
        responses = [self._text.decode(text.response, final=text.finished) for text in texts]
        return self.scorer.values([self._prompt_of(text.prompt) for text in texts], responses)

    def _said(self, prompt: Tokens) -> str:
        ids = list(prompt)
        if ids[:1] == [self._tokenizer.bos_token_id]:
            del ids[0]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
