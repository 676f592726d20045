"""The demo's main loop: every method on every policy, over the same prompts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from guided_decode import tiny_tulu
from guided_decode.lab.demo.decoding import Answers, Models, answer, draw, pick
from guided_decode.lab.demo.methods import (
    FEWER_SAMPLES,
    METHODS,
    OTHER_WIDTHS,
    SAMPLES,
    Method,
    best_of,
    reweight,
)
from guided_decode.lab.intervals import wilson


@dataclass(slots=True)
class Outcome:
    """What one method did on one policy, over all prompts.

    kl: nats, summed over all answers; a bound for best-of-n, exact for the others. seconds: on the
    clock, 0 for methods that were not run by themselves.
    """

    policy: str
    method: Method
    messages: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    responses: list[list[int]] = field(default_factory=list)
    kl: float = 0.0
    policy_tokens: int = 0
    scorer_tokens: int = 0
    seconds: float = 0.0

    def add(self, messages: Sequence[str], answers: Answers, seconds: float) -> None:
        """Counts a batch in."""
        self.messages += messages
        self.texts += answers.texts
        self.responses += answers.responses
        self.kl += float(answers.kl.sum())
        self.policy_tokens += answers.policy_tokens
        self.scorer_tokens += answers.scorer_tokens
        self.seconds += seconds

    @property
    def right(self) -> list[bool]:
        """Whether each answer states the right sum."""
        pairs = zip(self.messages, self.texts, strict=True)
        return [tiny_tulu.is_correct(message, text) for message, text in pairs]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.messages)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, Wilson."""
        return wilson(sum(self.right), len(self.messages))

    @property
    def kl_per_token(self) -> float:
        return self.kl / sum(map(len, self.responses))

    @property
    def tokens_per_answer(self) -> float:
        """Tokens that policy and critic, which are of one size, forwarded for an answer."""
        return (self.policy_tokens + self.scorer_tokens) / len(self.messages)


def steps(prompts: int, batch_size: int) -> int:
    """How often `compare` calls `advance` for one policy."""
    return (len(METHODS) + len(OTHER_WIDTHS)) * -(-prompts // batch_size)


def compare(
    policy: str,
    models: Models,
    messages: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    begin: Callable[[str], None] = lambda _: None,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Outcomes of all methods on one policy, in the order of METHODS, then the plot's others.

    begin: called with policy and method before it is run. advance: called after each batch.
    """
    more = [best_of(n) for n in FEWER_SAMPLES] + [reweight(k) for k in OTHER_WIDTHS]
    outcomes = {method: Outcome(policy, method) for method in (*METHODS, *more)}
    for method in (*METHODS, *(reweight(k) for k in OTHER_WIDTHS)):
        begin(f"{policy}: {method.name}")
        torch.manual_seed(seed)
        # What an earlier method left there would make this one cheaper than it is.
        models.critic.cache.clear()
        for batch in _batches(messages, batch_size):
            if method.best_of > 1:
                _best_of_n(models, batch, outcomes)
            else:
                begun = time.perf_counter()
                answers = answer(models, batch, method)
                outcomes[method].add(batch, answers, time.perf_counter() - begun)
            advance()
    return list(outcomes.values())


def _best_of_n(models: Models, messages: Sequence[str], outcomes: dict[Method, Outcome]) -> None:
    """One draw of samples, ranked as a whole and, for the plot, by its first few."""
    begun = time.perf_counter()
    samples = draw(models, messages, SAMPLES)
    drawn = time.perf_counter() - begun
    for n in (*FEWER_SAMPLES, SAMPLES):
        models.critic.cache.clear()
        begun = time.perf_counter()
        answers = pick(models, messages, [own[:n] for own in samples])
        seconds = drawn + time.perf_counter() - begun if n == SAMPLES else 0.0
        outcomes[best_of(n)].add(messages, answers, seconds)


def _batches(messages: Sequence[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(messages), size):
        yield list(messages[begin : begin + size])
