"""A judge with another tokenizer than the policy's: it reads what was written as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from guided_decode.search.judge_format import Chat, JudgeFormat
from guided_decode.search.judges import is_ended
from guided_decode.search.requests import Judged, JudgeOfTexts, Tokens
from guided_decode.search.response_text import ResponseText
from guided_decode.stats import ScorerStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextJudge:
    """Hands a policy's responses on to a judge as text, in the judge's chat format and tokens.

    A prompt's token ids hold the policy's template, so its chat has to be told (`tell`). A response
    is its decoded text: without special tokens of the policy's, without the bytes at its end that
    are not a character yet, and with the judge's EOS where the policy's ended it, there alone.

    Methods that value single tokens are refused: a token of the policy's may be part of a character
    or of a token of the judge's, whose value then is of something else.
    """

    through_text = True

    def __init__(
        self,
        judge: JudgeOfTexts,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy_tokenizer: PreTrainedTokenizerBase,
        prompt_format: str | None = None,
        terminals: Collection[int] = (),
    ) -> None:
        """
        Args:
            judge: a `ScorerJudge`, `PoolingJudge` or any other, of token ids of `tokenizer`.
            tokenizer: the judge's.
            policy_tokenizer: that of the policy, whose tokens come.
            prompt_format: the judge's, of `prompts.FORMATS`; None is its tokenizer's chat template.
            terminals: the policy's token ids that end a response, beside its tokenizer's EOS.

        Raises ValueError: a tokenizer that does not say what it has to.
        """
        self.inner = judge
        self._format = JudgeFormat(tokenizer, prompt_format)
        self._text = ResponseText(policy_tokenizer)
        own = () if policy_tokenizer.eos_token_id is None else (policy_tokenizer.eos_token_id,)
        self._terminals = frozenset({*terminals, *own})
        self._chats: dict[Tokens, Chat] = {}

    @property
    def stats(self) -> ScorerStats:
        """Counters of the judge that reads the text; of one that has none, zeros."""
        return getattr(self.inner, "stats", None) or ScorerStats()

    def tell(self, prompt: Sequence[int], chat: Chat) -> None:
        """Says which chat, or which text as it is, a prompt's token ids stand for.

        Raises ValueError: the judge's format cannot render it.
        """
        self._format.ids(chat, "", ended=False)
        self._chats[tuple(prompt)] = chat

    def forget(self) -> None:
        """Drops all chats that were told."""
        self._chats.clear()

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """As `requests.JudgeOfTexts.judge`.

        Raises ValueError: a prompt whose chat was not told; as the judge.
        """
        return self.inner.judge([self.translated(text) for text in texts])

    def translated(self, text: Judged) -> Judged:
        """The same in the judge's format and tokens."""
        chat = self._chats.get(text.prompt)
        if chat is None:
            raise ValueError(
                f"the chat of a prompt of {len(text.prompt)} tokens is not known, whose ids hold "
                "the policy's template: call tell(prompt, messages) before the search"
            )
        ended = is_ended(text, self._terminals)
        written = self._text.decode(text.response, final=ended)
        prompt, response = self._format.ids(chat, written, ended=ended)
        return Judged(tuple(prompt), tuple(response), ended)
