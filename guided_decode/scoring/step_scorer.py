"""Process reward models: one reward a step of a response, and one value of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from guided_decode.cache.prefix_cache import PrefixCache
from guided_decode.forward.packed_model import PackedModel
from guided_decode.scorer import LogProbs, Prefix, Scorer, TerminalRule
from guided_decode.scoring.closing import Closing
from guided_decode.scoring.critic import CriticScorer
from guided_decode.stats import ScorerStats

# From the rewards of all steps to one value.
Aggregate = Literal["last", "min", "product", "mean"]

NOT_TOKENS = (
    "a process reward model is read at the marks that end a response's steps, and says nothing of "
    "single tokens: judge responses, whole or at the ends of blocks, with it (search.StepJudge, "
    "guided-decode search and score), or guide tokens with a critic"
)


class StepRow(NamedTuple):
    """Token ids of a prompt and a response with its marks, and the indices of these."""

    ids: Sequence[int]
    marks: Sequence[int]


class StepScorer(Closing):
    """Scores the steps of responses with a process reward model, by text.

    It is a `Scorer` in all but single tokens: `score` and `refusal` say why not. Rewards that were
    read stay in the prefix cache, so that a response that grows costs its new steps.
    """

    scores_vocabulary = False
    terminal: TerminalRule = "critic"
    reward: Scorer | None = None
    reference: LogProbs | None = None

    def __init__(
        self, critic: CriticScorer, read: Callable[[str, str], StepRow], aggregate: Aggregate
    ) -> None:
        """
        Args:
            critic: the model with its head, which gives a reward at any token.
            read: a row of a prompt's text and a response's.
            aggregate: how `values` makes one value of the steps' rewards.
        """
        if aggregate not in get_args(Aggregate):
            raise ValueError(
                f"aggregate={aggregate!r}: expected one of {', '.join(get_args(Aggregate))}"
            )
        self.critic = critic
        self.stats: ScorerStats = critic.stats
        self.aggregate = aggregate
        self._read = read

    def __repr__(self) -> str:
        return f"StepScorer({self.critic!r}, aggregate={self.aggregate!r})"

    def _packed_models(self) -> Iterator[PackedModel]:
        yield self.critic.model

    def _is_shared(self) -> bool:
        return self.critic._is_shared()

    @property
    def model(self) -> PackedModel:
        return self.critic.model

    @property
    def cache(self) -> PrefixCache:
        return self.critic.cache

    @property
    def vocab_size(self) -> int:
        return self.critic.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self.critic.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.critic.eos_token_id

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> NoReturn:
        """Raises ValueError: it scores no tokens."""
        raise ValueError(NOT_TOKENS)

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why it scores no tokens."""
        return NOT_TOKENS

    def step_rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[float]]:
        """The reward of each step of each response.

        Args:
            prompts: text in the checkpoint's format, up to where the response begins, without BOS.
            responses: text, one a prompt; what follows the last separator is a step as well.

        Raises ValueError: a prompt is too long for the model, or its tokenizer cuts a mark.
        """
        rows = [self._read(*pair) for pair in zip(prompts, responses, strict=True)]
        nothing = torch.empty(len(rows), 0, dtype=torch.int64)
        # One packed forward; the prefixes that end at marks then lie in the cache.
        self.critic.score([row.ids[: row.marks[-1] + 1] for row in rows], nothing)
        prefixes = [row.ids[: mark + 1] for row in rows for mark in row.marks]
        nothing = torch.empty(len(prefixes), 0, dtype=torch.int64)
        found = iter(self.critic.score(prefixes, nothing).baseline.tolist())
        return [[next(found) for _ in row.marks] for row in rows]

    def values(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One value a response, by `aggregate`; arguments and errors as `step_rewards`."""
        return [
            aggregated(steps, self.aggregate) for steps in self.step_rewards(prompts, responses)
        ]


def aggregated(rewards: Sequence[float], how: Aggregate) -> float:
    """One value of the rewards of a response's steps, at least one."""
    if how == "last":
        return rewards[-1]
    if how == "min":
        return min(rewards)
    if how == "product":
        return math.prod(rewards)
    return math.fsum(rewards) / len(rewards)
