"""Where the values stand in a response, or in the chunks of one: `choices[i].guided_decode`."""

from collections.abc import Sequence
from typing import Any

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.passed import PassedTexts
from guided_decode.integrations.vllm.client_values.records import TokenValues, token_values
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from guided_decode.integrations.vllm.client_values.turns import turns

FIELD = "guided_decode"


class ResponseValues:
    """One response: its choices' texts as far as they have come."""

    def __init__(
        self, name: str, collector: ValueCollector, *, keep_ids: bool, choices: int
    ) -> None:
        """
        Args:
            name: of its request; open in the collector.
            collector: has what the worker knows.
            keep_ids: whether the client asked for token ids itself; else they are taken out again.
            choices: that the response has in all.
        """
        self._name = name
        self._collector = collector
        self._keep_ids = keep_ids
        self._choices: dict[int, GrowingText] = {}
        self._passed = PassedTexts(choices)
        self._prompt: list[int] = []
        self._begun = GrowingText()

    async def add(self, answer: dict[str, Any]) -> None:
        """Puts the values into a response or a chunk, as vLLM writes it with return_token_ids.

        The response goes on whatever fails here.
        """
        choices: list[dict[str, Any]] = answer.get("choices") or []
        try:
            await self._add(choices, answer.get("prompt_token_ids"))
        except Exception as error:
            self._collector.warn("they could not be put into one", repr(error))
            for choice in choices:
                choice[FIELD] = None
        for part in (answer, *choices):
            self._clean(part)

    async def _add(self, choices: Sequence[dict[str, Any]], prompt: list[int] | None) -> None:
        """All choices of one answer wait together. prompt: theirs, where they share one."""
        pieces: list[tuple[dict[str, Any], list[bytes], list[int]]] = []
        for choice in choices:
            text = self._text(choice, choice.get("prompt_token_ids") or prompt)
            tokens: list[int] | None = choice.get("token_ids")
            if text is not None and tokens is not None:
                texts = [
                    t async for i in turns(len(tokens)) for t in text.digests_before(tokens[i])
                ]
                pieces.append((choice, texts, tokens))
            elif "delta" not in choice:
                # The chunk that opens a choice has no tokens, and hidden reasoning shows none.
                choice[FIELD] = None
        if not pieces:
            return
        before = [text for _, texts, _ in pieces for text in texts]
        chosen = [token for _, _, tokens in pieces for token in tokens]
        known = await self._collector.known(self._name, before, chosen)
        for choice, texts, tokens in pieces:
            found = TokenValues([], [])
            async for i in turns(len(tokens)):
                piece = token_values(known, texts[i], tokens[i])
                found.prefix_values.extend(piece.prefix_values)
                found.advantages.extend(piece.advantages)
            choice[FIELD] = found._asdict()
            self._advance(choice, texts)
        known.forget(self._passed.take())

    def _advance(self, choice: dict[str, Any], texts: Sequence[bytes]) -> None:
        index, ends = choice["index"], choice.get("finish_reason") is not None
        self._passed.advance(index, texts, self._choices[index].length, ends=ends)

    def _text(self, choice: dict[str, Any], prompt: list[int] | None) -> GrowingText | None:
        """The choice's, as far as it has come; None where its prompt was not told."""
        index = choice["index"]
        if prompt is not None and index not in self._choices:
            # Samples of one prompt, which may be long, stand side by side.
            if prompt != self._prompt:
                self._prompt, self._begun = prompt, GrowingText(prompt)
            self._choices[index] = self._begun.copy()
        return self._choices.get(index)

    def _clean(self, part: dict[str, Any]) -> None:
        if self._keep_ids:
            return
        for name in ("token_ids", "prompt_token_ids"):
            if name in part:
                part[name] = None
