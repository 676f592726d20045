"""Searches of a batch of prompts, and the output lines that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.progress import ProgressColumn, Task
from rich.text import Text

from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.errors import report, typed
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
    from guided_decode.integrations.vllm import VllmGenerator
    from guided_decode.search.engine_stats import EngineStats
    from guided_decode.search.local import LocalGenerator
    from guided_decode.search.servers.generator import ServerGenerator
    from guided_decode.stats import ScorerStats

    AnyGenerator = LocalGenerator | ServerGenerator | VllmGenerator


class _Interrupted(Exception):
    """A batch that came to no end. lines: of its rows from the first on, as far as they did."""

    def __init__(self, lines: list[dict[str, Any]], cause: BaseException) -> None:
        super().__init__()
        self.lines, self.cause = lines, cause


@dataclass(frozen=True, slots=True)
class SearchJob:
    """How prompts are answered.

    judge: None where the method asks none. ids_of: a conversation as the policy's token ids; raises
    Refusal. run: what lines follow from, by name. ahead: what is finished before its turn. skip:
    what fails is reported, and the others go on.
    """

    plan: Plan
    generator: AnyGenerator
    judge: AnyJudge | None
    ids_of: Callable[[Messages], list[int]]
    run: str
    ahead: Ahead
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
        for _, group in groupby(batch, key=lambda row: row.problem is None):
            rows = list(group)
            try:
                yield from lines_of(rows, self._searched, self._failed)
            except _Interrupted as interrupted:
                # What was found is kept, though its batch was not.
                yield interrupted.lines
                self.ahead.settle(rows[: len(interrupted.lines)])
                raise interrupted.cause from None
            self.ahead.settle(rows)

    def _searched(self, batch: list[SearchRow]) -> list[dict[str, Any]]:
        known = {i: self.ahead.get(row) for i, row in enumerate(batch)}
        lines = {i: line for i, line in known.items() if line is not None}
        open_ = [i for i in range(len(batch)) if i not in lines]
        seeds = [derive(self.plan.seed, batch[i].index) for i in open_]
        searches = [
            self._begin(self.ids_of(batch[i].messages), seed)
            for i, seed in zip(open_, seeds, strict=True)
        ]

        def ended(number: int, result: SearchResult) -> None:
            i = open_[number]
            if result.chosen is None:
                limit = (result.stopped or "").replace("_", "-")
                report(f"{batch[i].where} has no response: --max-{limit} was spent before one "
                       "was begun")  # fmt: skip
            lines[i] = batch[i].line(self._found(result, seeds[number]), self.run)
            if len(lines) < len(batch):
                self.ahead.put(batch[i], lines[i])

        judge = self.judge or _NoJudge()
        try:
            run_all(searches, self.generator, judge, self.plan.budget, ended=ended)
        except (ConnectionError, KeyboardInterrupt) as error:
            first = next(i for i in range(len(batch) + 1) if i not in lines)
            raise _Interrupted([lines[i] for i in range(first)], error) from error
        return [lines[i] for i in range(len(batch))]

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

    def __init__(self, name: str, stats: ScorerStats | EngineStats) -> None:
        super().__init__()
        self._name, self._stats = name, stats

    def render(self, task: Task) -> Text:
        """As rich asks, several times a second."""
        return Text(f"{self._name} {self._stats.tokens:,} tokens")
