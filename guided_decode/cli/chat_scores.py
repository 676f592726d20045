"""Scores of whole conversations: what a critic, a reward model or a DPO pair says of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.chats import prompt_text, response_ids
from guided_decode.cli.token_texts import token_texts
from guided_decode.cli.token_values import finite, last_value, rounded, token_values
from guided_decode.scoring.step_scorer import StepScorer, aggregated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.scorer import Scorer


@dataclass(frozen=True, slots=True)
class ChatScorer:
    """A scorer with what it takes to read chats. prompt_format: as `chats.prompt_ids` takes it."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    prompt_format: str | None

    def score(self, chats: Sequence[Messages], *, per_token: bool) -> list[dict[str, Any]]:
        """For each chat {"score"}, with per_token also its response's {"tokens", "values"}; of a
        process reward model each step's {"values"}.

        The score is a reward model's at EOS, a critic's V at the last token that it was trained
        on, or an implicit reward's sum over the response.

        Raises Refusal or ValueError: one of them cannot be scored, or has a score that is no
        number.
        """
        if isinstance(self.scorer, StepScorer):
            return self._by_step(self.scorer, chats, per_step=per_token)
        pairs = [response_ids(self.tokenizer, self.prompt_format, chat) for chat in chats]
        if self.scorer.terminal != "included" and not per_token:
            return [{"score": rounded(finite(one))} for one in self._last_scores(pairs)]
        return [self._by_token(prompt, response, per_token) for prompt, response in pairs]

    def _by_step(
        self, scorer: StepScorer, chats: Sequence[Messages], *, per_step: bool
    ) -> list[dict[str, Any]]:
        prompts = [prompt_text(self.tokenizer, self.prompt_format, chat[:-1]) for chat in chats]
        rewards = scorer.step_rewards(prompts, [chat[-1]["content"] for chat in chats])
        lines: list[dict[str, Any]] = []
        for steps in rewards:
            line: dict[str, Any] = {"score": rounded(finite(aggregated(steps, scorer.aggregate)))}
            lines.append(line | ({"values": [rounded(one) for one in steps]} if per_step else {}))
        return lines

    @property
    def _terminals(self) -> list[int]:
        ends = (self.scorer.eos_token_id, self.tokenizer.eos_token_id)
        return sorted({token for token in ends if token is not None})

    def _last_scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The score at each last token, one call for all."""
        import torch

        from guided_decode.guidance.terminal import score_candidates

        whole = [prompt + response for prompt, response in pairs]
        last = torch.tensor([[ids[-1]] for ids in whole])
        scores, exempt = score_candidates(
            self.scorer, [ids[:-1] for ids in whole], last, [self._terminals] * len(whole)
        )
        values = scores.values[:, 0]
        if exempt is not None:
            values = torch.where(exempt[:, 0].to(values.device), scores.baseline, values)
        return values.float().cpu().tolist()

    def _by_token(self, prompt: list[int], response: list[int], per_token: bool) -> dict[str, Any]:
        values = token_values(self.scorer, prompt, response, self._terminals)
        if self.scorer.terminal == "included":
            score: float | None = sum(value for value in values if value is not None)
        else:
            score = last_value(values)
        line: dict[str, Any] = {"score": rounded(finite(score))}
        if per_token:
            line["tokens"] = token_texts(self.tokenizer, response, special=True)
            line["values"] = [rounded(finite(value)) for value in values]
        return line
