"""Where the values stand in a response, or in the chunks of one: `choices[i].guided_decode`."""

from typing import Any

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.records import texts_before, token_values
from guided_decode.integrations.vllm.client_values.texts import GrowingText

FIELD = "guided_decode"


class ResponseValues:
    """One response: its choices' texts as far as they have come."""

    def __init__(self, name: str, collector: ValueCollector, *, keep_ids: bool) -> None:
        """
        Args:
            name: of its request; open in the collector.
            collector: has what the worker knows.
            keep_ids: whether the client asked for token ids itself; else they are taken out again.
        """
        self._name = name
        self._collector = collector
        self._keep_ids = keep_ids
        self._choices: dict[int, GrowingText] = {}

    async def add(self, answer: dict[str, Any]) -> None:
        """Puts the values into a response or a chunk, as vLLM writes it with return_token_ids.

        The response goes on whatever fails here.
        """
        choices: list[dict[str, Any]] = answer.get("choices") or []
        shared = answer.get("prompt_token_ids")
        try:
            for choice in choices:
                self._begin(choice, choice.get("prompt_token_ids") or shared)
                await self._add_to(choice)
        except Exception as error:
            self._collector.warn("they could not be put into one", repr(error))
            for choice in choices:
                choice[FIELD] = None
        for part in (answer, *choices):
            self._clean(part)

    def _begin(self, choice: dict[str, Any], prompt: list[int] | None) -> None:
        if prompt is not None and choice["index"] not in self._choices:
            self._choices[choice["index"]] = GrowingText(prompt)

    async def _add_to(self, choice: dict[str, Any]) -> None:
        tokens, text = choice.get("token_ids"), self._choices.get(choice["index"])
        if tokens is None or text is None:
            # The chunk that opens a choice has no tokens, and hidden reasoning shows none.
            if "delta" not in choice:
                choice[FIELD] = None
            return
        texts = texts_before(text, tokens)
        known = await self._collector.known(self._name, texts, tokens)
        choice[FIELD] = token_values(known, texts, tokens)._asdict()

    def _clean(self, part: dict[str, Any]) -> None:
        if self._keep_ids:
            return
        for name in ("token_ids", "prompt_token_ids"):
            if name in part:
                part[name] = None
