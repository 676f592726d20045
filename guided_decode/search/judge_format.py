"""A chat and a response as a judge's own token ids: its chat format, its BOS, its EOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from guided_decode.checkpoints.prompts import find_format, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a response where a template is asked what comes before one.
_ANY = "(response)"
# A conversation that the assistant answers, or text that is continued as it is.
Chat = str | Sequence[Mapping[str, str]]


class Parts(NamedTuple):
    """What surrounds a response in a text."""

    before: str
    response: str
    after: str


class JudgeFormat:
    """Renders and tokenises as the judge's training did."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: str | None) -> None:
        """
        Args:
            tokenizer: the judge's. prompt_format: of `prompts.FORMATS`; None is its chat template.

        Raises ValueError: there is no such format; the tokenizer has no EOS.
        """
        if tokenizer.eos_token is None:
            raise ValueError(
                "the judge's tokenizer has no EOS, which ends finished responses: set it"
            )
        self.tokenizer = tokenizer
        self._format = None if prompt_format is None else find_format(prompt_format)
        added = tokenizer.added_tokens_decoder.values()
        self._special = {each.content for each in added if each.special}
        self._special |= set(tokenizer.all_special_tokens)

    def ids(self, chat: Chat, response: str, *, ended: bool) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, and of what follows it.

        Args:
            chat: what was asked; text is taken as it is.
            response: as far as it is written.
            ended: whether it is at its end, where the judge's EOS then is the last id.

        Raises ValueError: the format or template cannot render the chat.
        """
        parts = self._parts(chat, response, ended)
        lead = self._bos(chat)
        whole = lead + self._encode(*parts)
        eos = self.tokenizer.eos_token_id
        if ended and whole[-1:] != [eos]:
            raise ValueError(
                f"a finished response ends with the token id {whole[-1:]} in the judge's format: "
                f"expected its EOS, {eos}; the tokenizer must read {self.tokenizer.eos_token!r} as "
                "one token"
            )
        prompt = lead + self._encode(parts.before, "", "")
        # The tokenizer may merge the prompt's end with the response's beginning.
        pairs = zip(prompt, whole, strict=False)
        shared = next((i for i, (one, other) in enumerate(pairs) if one != other), len(prompt))
        shared = min(shared, len(whole))
        return whole[:shared], whole[shared:]

    def _parts(self, chat: Chat, response: str, ended: bool) -> Parts:
        eos = self.tokenizer.eos_token
        if isinstance(chat, str):
            return Parts(chat, response, eos if ended else "")
        before = self._before(chat)
        if not ended:
            return Parts(before, response, "")
        whole = self._render([*chat, {"role": "assistant", "content": response}], open_=False)
        # Up to its EOS, whatever a format puts after it; some have none there.
        until = whole.rfind(eos)
        whole = whole[: until + len(eos)] if until >= len(before) else whole + eos
        # Templates may trim what they are given.
        for written in (response, response.strip(), response.rstrip()):
            if whole.startswith(before + written):
                return Parts(before, written, whole[len(before + written) :])
        return Parts(whole, "", "")

    def _before(self, chat: Sequence[Mapping[str, str]]) -> str:
        """The text before a response. Of a template that of a whole turn, as training had it, which
        may have more than the one that asks for an answer: an empty thought, say."""
        asked = self._render(chat, open_=True)
        if self._format is not None:
            return asked
        turn = self._render([*chat, {"role": "assistant", "content": _ANY}], open_=False)
        before, found, _ = turn.rpartition(_ANY)
        return before if found else asked

    def _render(self, chat: Sequence[Mapping[str, str]], *, open_: bool) -> str:
        if self._format is not None:
            return render(
                chat, self._format, add_generation_prompt=open_, end="turn" if open_ else "eos",
                eos_token=self.tokenizer.eos_token,
            )  # fmt: skip
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the judge's tokenizer has no chat template: pass the format that it was trained "
                "on as prompt_format="
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(each) for each in chat], tokenize=False, add_generation_prompt=open_
                )
            )
        except Exception as error:
            # A template is a program of the checkpoint's: it raises what it likes.
            said = " ".join(str(error).split())
            raise ValueError(f"the judge's chat template refuses the chat: {said}") from error

    def _bos(self, chat: Chat) -> list[int]:
        """BOS, where the texts of training began with it; a template writes its own."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return []
        if self._format is not None:
            return [bos] if self._format.bos else []
        return [bos] if isinstance(chat, str) and self.tokenizer.encode("")[:1] == [bos] else []

    def _encode(self, before: str, response: str, after: str) -> list[int]:
        """As one text, as training had it; special tokens that a response spells stay text."""
        if not any(each in response for each in self._special):
            return self._ids(before + response + after)
        end = max((before.rfind(each) + len(each) for each in self._special if each in before),
                  default=0)  # fmt: skip
        plain = self._ids(before[end:] + response, split_special_tokens=True)
        return self._ids(before[:end]) + plain + self._ids(after)

    def _ids(self, text: str, **how: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, **how)
        return ids
