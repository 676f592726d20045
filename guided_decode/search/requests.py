"""What methods ask, what they are answered, and the protocols that answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

Tokens = tuple[int, ...]
# Why a continuation ended: an end-of-sequence token, a stop string, or its most tokens.
Reason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a policy wrote after a prefix.

    tokens: ids, the end-of-sequence token or the stop string's last token among them.
    log_probs: of each token under the policy, at temperature 1 and without truncation.
    reason: why it ended.
    """

    tokens: Tokens
    log_probs: tuple[float, ...]
    reason: Reason

    @property
    def finished(self) -> bool:
        """Whether the response is at its end, and not only this piece of it."""
        return self.reason == "eos"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How continuations are drawn; 0 is greedy.

    stop: strings; a piece ends with the first token that completes one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature}: expected a number of at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: expected a number above 0 and at most 1")
        if isinstance(self.stop, str) or any(not one for one in self.stop):
            raise ValueError(f"stop={self.stop!r}: expected strings of at least one character")


class Generator(Protocol):
    """Continues prefixes with a policy."""

    def extend(
        self,
        prefixes: Sequence[Sequence[int]],
        n: Sequence[int],
        *,
        max_tokens: Sequence[int],
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
    ) -> list[list[Continuation]]:
        """Draws n[i] continuations of each prefix, of at most max_tokens[i] tokens.

        A continuation depends on its prefix, its seed and its number alone, so far as the engine
        computes the same logits in every batch.

        Args:
            prefixes: token ids, unpadded, at least one each.
            n, max_tokens, sampling, seeds: one a prefix.
        """
        ...


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The likeliest next tokens after a prefix, the likeliest first; ties by the lower id.

    tokens: ids. log_probs: of each under the policy's whole softmax, at temperature 1. tempered:
    the same at the temperature that was asked for. ends: whether each would end the response.
    entropy: of the whole distribution at temperature 1, in nats; None: not asked for, of an engine
    that would have to tell it all. reference, reference_tempered: log-probabilities of the same
    tokens under the reference; None: not asked for.
    """

    tokens: Tokens
    log_probs: tuple[float, ...]
    tempered: tuple[float, ...]
    ends: tuple[bool, ...]
    entropy: float | None
    reference: tuple[float, ...] | None = None
    reference_tempered: tuple[float, ...] | None = None


@runtime_checkable
class TokenGenerator(Protocol):
    """A generator that also tells its next-token distributions: for token-level methods."""

    def next_tokens(
        self,
        prefixes: Sequence[Sequence[int]],
        k: Sequence[int],
        *,
        temperatures: Sequence[float],
        references: Sequence[bool],
        entropies: Sequence[bool] | None = None,
    ) -> list[NextTokens]:
        """The k[i] likeliest next tokens after each prefix; fewer where the vocabulary is smaller.

        Args:
            prefixes: token ids, unpadded, at least one each.
            k, temperatures: one a prefix; temperatures above 0.
            references, entropies: one a prefix: whether the reference's log-probabilities, and
                the entropy, are wanted. No entropies: of none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A text to be valued: what was asked, what was answered so far, whether that is all."""

    prompt: Tokens
    response: Tokens
    finished: bool


class JudgeOfTexts(Protocol):
    """Values whole or partial responses; higher is better."""

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """One finite number a text."""
        ...


@dataclass(frozen=True, slots=True)
class Extend:
    """A method's request for n continuations of each prefix. max_tokens, seeds: one a prefix."""

    prefixes: Sequence[Tokens]
    n: int
    max_tokens: Sequence[int]
    sampling: Sampling
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Next:
    """A method's request for the k likeliest next tokens of each prefix, and how likely they are.

    temperature: of `NextTokens.tempered`. reference, entropy: the reference's log-probabilities,
    the entropy as well.
    """

    prefixes: Sequence[Tokens]
    k: int
    temperature: float = 1.0
    reference: bool = False
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class Judge:
    """A method's request for the values of texts.

    per_token: each is one token longer than one that has a value: a judge that reads text, and not
    tokens, is refused.
    """

    texts: Sequence[Judged] = field(default_factory=tuple)
    per_token: bool = False


Request = Extend | Next | Judge
