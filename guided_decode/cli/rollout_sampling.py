"""Responses to prompts, drawn for `train-critic`: several a prompt, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guided_decode.cli.errors import Refusal, typed
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.rollout_rows import RolloutRow
from guided_decode.cli.run_identity import digest
from guided_decode.cli.score_run import lines_of
from guided_decode.search.requests import Sampling
from guided_decode.search.seeds import derive

if TYPE_CHECKING:
    from guided_decode.cli.search_run import AnyGenerator


@dataclass(frozen=True, slots=True)
class Draw:
    """One response that is to be drawn. sample: its number among those of its prompt."""

    row: RolloutRow
    sample: int
    problem: str | None = None

    @property
    def key(self) -> str:
        """What its line is known by."""
        return digest([self.row.key, self.row.number, self.sample])


def draws_of(rows: list[RolloutRow], samples: int) -> list[Draw]:
    """All that are to be drawn, a prompt's one after the other."""
    return [Draw(row, sample) for row in rows for sample in range(samples)]


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """How responses are drawn. run: what they follow from, by name."""

    generator: AnyGenerator
    reader: RolloutReader
    sampling: Sampling
    max_tokens: int
    seed: int
    run: str

    def lines(self, batch: list[Draw]) -> Iterator[list[dict[str, Any]]]:
        """The batch's lines; one by one where one cannot be drawn. Raises Refusal: names it."""
        return lines_of(batch, self._drawn, self._failed)

    def _drawn(self, batch: list[Draw]) -> list[dict[str, Any]]:
        prompts = [self.reader.prompt(draw.row) for draw in batch]
        found = self.generator.extend(
            prompts,
            [1] * len(batch),
            max_tokens=[self.max_tokens] * len(batch),
            sampling=[self.sampling] * len(batch),
            seeds=[derive(self.seed, draw.row.number, draw.sample) for draw in batch],
        )
        lines = []
        for draw, prompt, (one,) in zip(batch, prompts, found, strict=True):
            row = draw.row
            asked = {"prompt": row.prompt} if row.messages else {}
            lines.append(
                {
                    "line": row.number,
                    "sample": draw.sample,
                    **row.passed,
                    **asked,
                    "response": self.generator.decode(one.tokens),
                    "prompt_ids": list(prompt),
                    "response_ids": list(one.tokens),
                    "finished": one.finished,
                    "key": draw.key,
                    "run": self.run,
                }
            )
        return lines

    def _failed(self, draw: Draw, error: Exception) -> dict[str, Any]:
        said = typed(error)
        where = "" if said.startswith(draw.row.where) else f"{draw.row.where}: "
        raise Refusal(f"{where}{said}") from error
