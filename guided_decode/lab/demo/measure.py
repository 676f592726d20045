"""The demo's main loop: every method on every policy, over the same prompts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from guided_decode.lab.demo import methods
from guided_decode.lab.demo.decoding import Answers, Models, answer, draw, pick
from guided_decode.lab.demo.methods import Method, Plan
from guided_decode.lab.demo.task import SUMS, Task


@dataclass(slots=True)
class Outcome:
    """What one method did on one policy, over all prompts.

    policy: the name of its section. kl: nats, summed over all answers; a bound for best-of-n,
    exact for the others. seconds: on the clock, 0 for methods that were not run by themselves.
    task: who judges.
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
    task: Task = SUMS

    @property
    def title(self) -> str:
        """Of its section."""
        return self.task.title.format(self.policy)

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
    def judgements(self) -> list[float]:
        """What the judge says of each answer."""
        pairs = zip(self.messages, self.texts, strict=True)
        return [self.task.judge(message, text) for message, text in pairs]

    @property
    def right(self) -> list[bool]:
        """Whether each answer is what the judge gives its full mark."""
        return [one == 1.0 for one in self.judgements]

    @property
    def score(self) -> float:
        """The mean judgement: an accuracy where the judge says 0 or 1."""
        return sum(self.judgements) / len(self.messages)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, 95%."""
        return self.task.interval(self.judgements)

    @property
    def kl_per_token(self) -> float:
        return self.kl / sum(map(len, self.responses))

    @property
    def tokens_per_answer(self) -> float:
        """Tokens that policy and critic, which are of one size, forwarded for an answer."""
        return (self.policy_tokens + self.scorer_tokens) / len(self.messages)


def steps(prompts: int, batch_size: int, plan: Plan = methods.SUMS) -> int:
    """How often `compare` calls `advance` for one policy."""
    return plan.runs * -(-prompts // batch_size)


def compare(
    policy: str,
    models: Models,
    messages: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    plan: Plan = methods.SUMS,
    begin: Callable[[str], None] = lambda _: None,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Outcomes of all methods on one policy, in the order of the plan.

    begin: called with policy and method before it is run. advance: called after each batch.
    """
    outcomes = {method: Outcome(policy, method, task=models.task) for method in plan.every}
    for method in plan.every:
        if method in plan.best_of[1:]:
            continue  # of the draw of the first of them
        begin(f"{policy}: {method.name}")
        torch.manual_seed(seed)
        # What an earlier method left there would make this one cheaper than it is.
        for scorer in (models.critic, *(models.trunk or ())[:1]):
            scorer.cache.clear()
        for batch in _batches(messages, batch_size):
            if method.best_of > 1:
                _best_of_n(models, batch, {one: outcomes[one] for one in plan.best_of})
            else:
                begun = time.perf_counter()
                answers = answer(models, batch, method)
                outcomes[method].add(batch, answers, time.perf_counter() - begun)
            advance()
    return list(outcomes.values())


def _best_of_n(models: Models, messages: Sequence[str], outcomes: dict[Method, Outcome]) -> None:
    """One draw of samples, ranked as a whole and, for the plot, by its first few."""
    most = max(method.best_of for method in outcomes)
    begun = time.perf_counter()
    samples = draw(models, messages, most)
    drawn = time.perf_counter() - begun
    for method, outcome in outcomes.items():
        models.critic.cache.clear()
        begun = time.perf_counter()
        answers = pick(models, messages, [own[: method.best_of] for own in samples], method.by)
        seconds = drawn + time.perf_counter() - begun if method.best_of == most else 0.0
        outcome.add(messages, answers, seconds)


def _batches(messages: Sequence[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(messages), size):
        yield list(messages[begin : begin + size])
