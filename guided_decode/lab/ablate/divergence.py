"""How far a decoded response is from the policy: exactly, or at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode.lab.demo.divergences import best_of_kl, greedy_kl, sampled_kl

# What `generate` takes as a logits processor.
Processor = Callable[[Tensor, Tensor], Tensor]
_BLOCKS = ("block", "cd", "vgs", "dvts", "chunk-beam", "value-beam")


class Measured:
    """A logits processor that hands on what another makes of the logits, or leaves them as they
    are, and measures each step's divergence from the policy at temperature 1."""

    def __init__(self, processor: Processor | None, temperature: float) -> None:
        """
        Args:
            processor: guides; nothing else may be before it. None: nothing guides.
            temperature: at which the next token is drawn; 0 is greedy.
        """
        self._processor, self._temperature = processor, temperature
        self._plain: Tensor | None = None
        self._kl: list[Tensor] = []
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next logits, [rows, vocab]."""
        self._take(input_ids[:, -1])
        guided = scores if self._processor is None else self._processor(input_ids, scores)
        if self._temperature == 0.0:
            self._kl.append(greedy_kl(guided.argmax(-1), scores).double().cpu())
        elif self._processor is None and self._temperature == 1.0:
            self._kl.append(torch.zeros(len(scores), dtype=torch.float64))
        else:
            self._kl.append(sampled_kl(guided / self._temperature, scores).double().cpu())
        self._plain = scores
        return guided

    def _take(self, tokens: Tensor) -> None:
        """What was drawn from the last logits."""
        if self._plain is not None:
            own = self._plain.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            self._log_probs.append(own.double().cpu())

    def sums(self, last: Tensor, lengths: Sequence[int]) -> tuple[list[float], list[float]]:
        """Of each row's first `lengths` tokens, the divergence and the policy's log-probability.

        last: int64 [rows], the token that was drawn in the last step.
        """
        self._take(last)
        live = torch.arange(len(self._kl)) < torch.tensor(list(lengths))[:, None]
        kl, log_probs = (torch.stack(each, 1) for each in (self._kl, self._log_probs))
        # Finished rows go on with padding, of which nothing is asked.
        own = [torch.where(live, each, 0.0).sum(-1).tolist() for each in (kl, log_probs)]
        return own[0], own[1]


def most_divergence(method: str, settings: Mapping[str, Any], tokens: int) -> float | None:
    """The most, in nats, that a search's response of so many tokens can be from the policy.

    A response that is one of N draws has at most N times the policy's probability: log N. One that
    is made of R rounds in each of which N pieces are drawn: R·log N. Of the best of n by a value,
    log n − (n − 1)/n (Beirami et al., arXiv 2401.01879), for each block of CD, too.

    settings: all of the method's. None: nothing is known beyond −log π of the response, which
    bounds every method (KL = −H(q) − E log π, and an entropy is not below 0).
    """
    if settings.get("temperature", 1.0) != 1.0 or settings.get("top_p", 1.0) != 1.0:
        return None
    if method == "best-of-n":
        return best_of_kl(settings["n"])
    if method in ("vote", "weighted-vote"):
        return math.log(settings["n"])
    rounds = _rounds(settings, tokens)
    if rounds is None:
        return None
    if method in _BLOCKS:
        width, trees = settings["width"], settings["trees"]
        if width * trees == 1:
            return rounds * best_of_kl(settings["branches"])
        return math.log(trees) + rounds * math.log(width * settings["branches"])
    if method in ("smc", "prune-and-refill"):
        return rounds * math.log(settings["particles" if method == "smc" else "n"])
    return None


def _rounds(settings: Mapping[str, Any], tokens: int) -> int | None:
    """Pieces that a response is made of; None where strings end them, wherever they come."""
    if "block" not in settings or settings.get("stop"):
        return None
    return -(-tokens // int(settings["block"]))
