"""Searches of a batch of prompts, and the output lines that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.progress import ProgressColumn, Task
from rich.text import Text

from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.errors import typed
from guided_decode.cli.score_run import lines_of, skipped_or_refused
from guided_decode.cli.search_plan import Plan
from guided_decode.cli.search_rows import SearchRow, as_json, why_ended
from guided_decode.cli.token_values import rounded
from guided_decode.search.driver import run_all
from guided_decode.search.requests import Judged, Tokens
from guided_decode.search.result import Candidate, Search, SearchResult
from guided_decode.search.seeds import derive

if TYPE_CHECKING:
    from guided_decode.cli.search_judges import AnyJudge
    from guided_decode.search.local import LocalGenerator
    from guided_decode.stats import ScorerStats


@dataclass(frozen=True, slots=True)
class SearchJob:
    """How prompts are answered.

    judge: None where the method asks none. ids_of: a conversation as the policy's token ids; raises
    Refusal. run: what lines follow from, by name. skip: what fails is reported, and the others go
    on.
    """

    plan: Plan
    generator: LocalGenerator
    judge: AnyJudge | None
    ids_of: Callable[[Messages], list[int]]
    run: str
    skip: bool

    def columns(self) -> list[ProgressColumn]:
        """What a progress bar shows of the models at work."""
        shown: list[ProgressColumn] = [_Tokens("policy", self.generator.stats)]
        if self.judge is not None:
            shown.append(_Tokens("scorer", self.judge.stats))
        return shown

    def lines(self, batch: list[SearchRow]) -> Iterator[list[dict[str, Any]]]:
        """The batch's output lines; one by one where a prompt of it cannot be searched."""
        # A broken line does not take its neighbours out of their batch.
        for _, rows in groupby(batch, key=lambda row: row.problem is None):
            yield from lines_of(list(rows), self._searched, self._failed)

    def _searched(self, batch: list[SearchRow]) -> list[dict[str, Any]]:
        seeds = [derive(self.plan.seed, row.index) for row in batch]
        searches = [
            self._begin(self.ids_of(row.messages), seed)
            for row, seed in zip(batch, seeds, strict=True)
        ]
        results = run_all(searches, self.generator, self.judge or _NoJudge(), self.plan.budget)
        return [
            row.line(self._found(result, seed), self.run)
            for row, seed, result in zip(batch, seeds, results, strict=True)
        ]

    def _begin(self, prompt: Sequence[int], seed: int) -> Search:
        plan = self.plan
        answer = None if plan.answer is None else self._answer
        return plan.method.begin(
            prompt, seed=seed, max_tokens=plan.max_tokens, answer=answer, **plan.settings
        )

    def _answer(self, tokens: Tokens) -> Any:
        assert self.plan.answer is not None
        return self.plan.answer(self.generator.decode(tokens))

    def _found(self, result: SearchResult, seed: int) -> dict[str, Any]:
        best = None if result.chosen is None else result.candidates[result.chosen]
        spent = result.spent
        return {
            "method": self.plan.method.name,
            "seed": seed,
            "response": None if best is None else self.generator.decode(best.tokens),
            "chosen": result.chosen,
            "score": None if best is None else rounded(best.score),
            "candidates": [self._candidate(each, result) for each in result.candidates],
            "stopped": result.stopped,
            "details": as_json(result.details),
            "cost": {
                "policy_tokens": spent.policy_tokens,
                "scorer_tokens": spent.scorer_tokens,
                "generated_tokens": spent.generated,
                "calls": spent.calls,
                "seconds": round(spent.seconds, 4),
            },
        }

    def _candidate(self, candidate: Candidate, result: SearchResult) -> dict[str, Any]:
        ended = why_ended(candidate, result, self.plan.max_tokens, self.generator.eos_token_ids)
        line = {
            "response": self.generator.decode(candidate.tokens),
            "score": rounded(candidate.score),
            "log_prob": rounded(candidate.log_prob),
            "tokens": len(candidate.tokens),
            "finished": ended in ("eos", "stop"),
            "ended": ended,
        }
        if self.plan.answer is not None:
            answer = self._answer(candidate.tokens)
            line["answer"] = None if answer is None else str(answer)
        return line

    def _failed(self, row: SearchRow, error: Exception) -> dict[str, Any]:
        skipped_or_refused(f"{row.where} has no result: {typed(error)}", self.skip, error)
        return row.line({"error": typed(error)}, self.run)


class _NoJudge:
    """Stands where a method asks no judge."""

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """Never called."""
        raise AssertionError("a method that asks no judge asked one")


class _Tokens(ProgressColumn):
    """Tokens that went through a model so far, while it works."""

    def __init__(self, name: str, stats: ScorerStats) -> None:
        super().__init__()
        self._name, self._stats = name, stats

    def render(self, task: Task) -> Text:
        """As rich asks, several times a second."""
        return Text(f"{self._name} {self._stats.tokens:,} tokens")
