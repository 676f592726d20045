"""Log-ratios of an implicit reward along responses that share beginnings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from guided_decode.scorer import Scorer
from guided_decode.search.requests import Judged, Tokens

# Beyond so many tokens everything is forgotten, and read again where it is asked for.
_MOST_KNOWN = 1 << 18


class ResponseRatios:
    """Sums of log π(token) / π_ref(token) over responses; each token of a tree is asked once.

    A log-ratio wants logits, which no prefix cache holds: without this a search would forward each
    response from its beginning, block after block.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._roots: dict[Tokens, int] = {}
        # A node and the token after it: the node that they make, and the token's log-ratio.
        self._children: dict[tuple[int, int], tuple[int, float]] = {}

    def sums(self, texts: Sequence[Judged]) -> list[float]:
        """One sum a text. Raises ValueError: as the scorer."""
        if self._nodes > _MOST_KNOWN:
            self._roots, self._children = {}, {}
        rows = self._unknown(texts)
        if rows:
            prefixes = [prompt + response[:-1] for prompt, response in rows]
            last = torch.tensor([[response[-1]] for _, response in rows])
            ratios = self._scorer.score(prefixes, last).values[:, 0].tolist()
            for (prompt, response), ratio in zip(rows, ratios, strict=True):
                self._learn(prompt, response, ratio)
        return [math.fsum(self._known(text.prompt, text.response)) for text in texts]

    def _unknown(self, texts: Sequence[Judged]) -> list[tuple[Tokens, Tokens]]:
        """Prompts and beginnings of responses whose last token's log-ratio is not known."""
        missing = {
            (text.prompt, text.response[:length]): None
            for text in texts
            for length in range(
                1 + len(self._known(text.prompt, text.response)), 1 + len(text.response)
            )
        }
        return list(missing)

    def _known(self, prompt: Tokens, response: Tokens) -> list[float]:
        """Log-ratios of the response's tokens, as far as they are known."""
        ratios: list[float] = []
        node = self._roots.get(prompt)
        for token in response:
            found = None if node is None else self._children.get((node, token))
            if found is None:
                break
            node, ratio = found
            ratios.append(ratio)
        return ratios

    def _learn(self, prompt: Tokens, response: Tokens, ratio: float) -> None:
        """The log-ratio of the response's last token; those before it are known."""
        node = self._roots.setdefault(prompt, self._nodes)
        for token in response[:-1]:
            node, _ = self._children[node, token]
        self._children[node, response[-1]] = (self._nodes, ratio)

    @property
    def _nodes(self) -> int:
        return len(self._roots) + len(self._children)
