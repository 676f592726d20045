"""Lines of rollouts as the policy's token ids."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guided_decode.cli.chats import prompt_ids, raw_ids, response_ids
from guided_decode.cli.errors import Refusal
from guided_decode.cli.rollout_rows import RolloutRow
from guided_decode.critics.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RolloutReader:
    """How a policy's lines become token ids.

    text_format: of its chats, as `chats.prompt_ids`. raw: prompts are text as it is. terminals:
    what ends a response. vocab_size: ids from here on are none.
    """

    tokenizer: PreTrainedTokenizerBase
    text_format: str | None
    raw: bool
    terminals: Collection[int]
    vocab_size: int

    def prompt(self, row: RolloutRow) -> tuple[int, ...]:
        """The token ids that the policy continues. Raises Refusal: names the line."""
        try:
            if row.prompt_ids is not None:
                return self._checked(row.prompt_ids)
            if not self.raw:
                return tuple(prompt_ids(self.tokenizer, self.text_format, row.messages))
            if len(row.messages) > 1:
                raise Refusal(f"--raw takes text, and this chat has {len(row.messages)} messages")
            text = row.messages[0]["content"]
            return tuple(raw_ids(self.tokenizer, self.text_format, text))
        except (Refusal, ValueError) as error:
            raise Refusal(f"{row.where}: {error}") from error

    def rollout(self, row: RolloutRow, reward: float | None = None) -> Rollout:
        """The whole line; a response of text is finished where the line does not say otherwise.

        reward: in place of the line's; 0 where there is neither.

        Raises Refusal: names the line.
        """
        prompt, response = self.prompt(row), row.response_ids
        if response is None:
            prompt, response = self._of_text(row, prompt)
        try:
            response = self._checked(response)
        except Refusal as error:
            raise Refusal(f"{row.where}: {error}") from error
        if not response:
            raise Refusal(f"{row.where}: the response has no token")
        ended = response[-1] in self.terminals
        finished = ended if row.finished is None else row.finished and ended
        own = row.reward if reward is None else reward
        return Rollout(prompt, response, own or 0.0, finished)

    def with_texts(self, row: RolloutRow) -> RolloutRow:
        """The line with text where it has token ids alone, for a judge that reads text."""
        messages, response = row.messages, row.response
        if not messages:
            assert row.prompt_ids is not None
            text = self.tokenizer.decode(list(row.prompt_ids), skip_special_tokens=True)
            messages = [{"role": "user", "content": str(text)}]
        if response is None and row.response_ids is not None:
            response = str(self.tokenizer.decode(list(row.response_ids), skip_special_tokens=True))
        return replace(row, messages=messages, response=response)

    def _of_text(
        self, row: RolloutRow, prompt: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert row.response is not None
        eos = self.tokenizer.eos_token_id
        if row.messages and row.prompt_ids is None and not self.raw:
            turns = [*row.messages, {"role": "assistant", "content": row.response}]
            try:
                pair = response_ids(self.tokenizer, self.text_format, turns)
            except (Refusal, ValueError) as error:
                raise Refusal(f"{row.where}: {error}") from error
            prompt, ids = tuple(pair[0]), pair[1]
        else:
            ids = self.tokenizer.encode(row.response, add_special_tokens=False)
            ids += [eos] if eos is not None and ids[-1:] != [eos] else []
        if row.finished is False and ids[-1:] == [eos]:
            ids = ids[:-1]
        return prompt, tuple(ids)

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        odd = next((each for each in ids if not 0 <= each < self.vocab_size), None)
        if odd is not None:
            raise Refusal(f"token id {odd}: the policy has {self.vocab_size} tokens")
        return ids
