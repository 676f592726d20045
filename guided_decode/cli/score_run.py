"""A run over a file of chats: what it was computed with, where its lines go, how it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from guided_decode.checkpoints.registry import find
from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.checkpoints import parse_dtype, pick_device
from guided_decode.cli.errors import INTERRUPTED, Refusal, report, typed
from guided_decode.cli.jsonl import STDIN
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.run_identity import adapter_home, run_identity
from guided_decode.cli.score_rows import Row
from guided_decode.cli.scored_file import ScoredFile, ScoredStream

STDOUT = STDIN
# What changes the cost of a score, or whether there is one, and not the score.
_SAME_SCORES = (
    "cache_tokens", "max_forward_tokens", "allow_pickle", "trust_remote_code", "device_map",
    "tp_plan",
)  # fmt: skip


def identity(
    scorer: str,
    reading: ScorerOptions,
    device: str | None,
    dtype: str,
    settings: Mapping[str, object],
) -> str:
    """What the run's scores follow from, by name; finds out that a model is not there.

    settings: of the command, by name, from which its lines follow too.
    """
    given = reading.given()
    record = find(scorer)
    reference = reading.reference or (None if record is None else record.reference)
    others = {
        "head": reading.head,
        "reward": reading.reward,
        "reference": reference,
        "adapter": adapter_home(scorer, reading.adapter),
    }
    on_cpu = pick_device(device).startswith("cpu")
    settled = parse_dtype(dtype) or ("float32" if on_cpu else dtype)
    own = {name: value for name, value in given.items() if name not in (*others, *_SAME_SCORES)}
    own |= {"dtype": str(settled).removeprefix("torch."), **settings}
    return run_identity({"scorer": scorer, **others}, own, reading.revision, reading.gguf_file)


class Keyed(Protocol):
    """A row with the digest of its text."""

    @property
    def key(self) -> str: ...


def open_output(
    source: Path, output: Path, rows: Sequence[Keyed], run: str, overwrite: bool
) -> ScoredFile | ScoredStream:
    """Where the lines of a run go; what an earlier run of the same finished stays.

    Raises Refusal: as `ScoredFile`, or the output is the input. OSError: it cannot be written.
    """
    if output == STDOUT:
        return ScoredStream()
    if source != STDIN and output.exists() and source.samefile(output):
        raise Refusal(f"{output} is the input: pass another file for the output")
    return ScoredFile(output, [row.key for row in rows], run, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class Job:
    """How rows are scored.

    answer: scores of conversations, one dict each; raises Refusal or ValueError for all of them if
    one cannot be scored. run: what they are computed with, by name. skip: what cannot be scored is
    reported, and the others go on.
    """

    answer: Callable[[Sequence[Messages]], list[dict[str, Any]]]
    run: str
    skip: bool

    def lines(self, batch: list[Row]) -> Iterator[list[dict[str, Any]]]:
        """The batch's output lines; one by one where a row of it cannot be scored."""
        return lines_of(batch, self._scored, self._unscored)

    def _scored(self, batch: list[Row]) -> list[dict[str, Any]]:
        answers = iter(self.answer([chat for row in batch for chat in row.chats]))
        return [row.scored([next(answers) for _ in row.chats], self.run) for row in batch]

    def _unscored(self, row: Row, error: Exception) -> dict[str, Any]:
        skipped_or_refused(f"{row.where} cannot be scored: {typed(error)}", self.skip, error)
        return row.skipped(typed(error), self.run)


class Answerable(Protocol):
    """A row of any input. problem: why it is none, where it is broken."""

    @property
    def problem(self) -> str | None: ...


_AnyRow = TypeVar("_AnyRow", bound=Answerable)


class Lines(Protocol[_AnyRow]):
    """What makes output lines of rows."""

    def lines(self, batch: list[_AnyRow]) -> Iterator[list[dict[str, Any]]]:
        """The batch's output lines, in its order, in one list or more."""
        ...


def lines_of(
    batch: list[_AnyRow],
    whole: Callable[[list[_AnyRow]], list[dict[str, Any]]],
    failed: Callable[[_AnyRow, Exception], dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """The batch's output lines; one by one where a row of it cannot be answered."""
    try:
        for row in batch:
            if row.problem is not None:
                raise Refusal(row.problem)
        lines = whole(batch)
    except (ValueError, Refusal) as error:
        if len(batch) == 1:
            yield [failed(batch[0], error)]
            return
        # What comes before the row that cannot be answered is worth keeping.
        for row in batch:
            yield from lines_of([row], whole, failed)
        return
    yield lines


def skipped_or_refused(message: str, skip: bool, error: Exception) -> None:
    """Reports what failed. Raises Refusal: it is not to be skipped."""
    if not skip:
        raise Refusal(message) from error
    report(message)


def score_rest(
    job: Lines[_AnyRow],
    rows: list[_AnyRow],
    file: ScoredFile | ScoredStream,
    batch_size: int,
    *,
    doing: str = "scoring",
    done_so: str = "chats are scored",
    beside: Sequence[ProgressColumn] = (),
) -> None:
    """Answers the rows that are not done yet, a batch a call, with a progress bar on stderr.

    doing, done_so: what the bar and an interruption say. beside: what else the bar shows.
    """
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), *beside, TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    done, console = file.done, Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(doing, total=len(rows), completed=done)
        try:
            for begin in range(done, len(rows), batch_size):
                for lines in job.lines(rows[begin : begin + batch_size]):
                    file.append(lines)
                    file.failed += sum("error" in line for line in lines)
                    done += len(lines)
                    progress.update(bar, completed=done)
        except KeyboardInterrupt:
            progress.stop()
            goes_on = (
                "" if isinstance(file, ScoredStream) else ("; the same command goes on from there")
            )
            print(f"interrupted: {done} of {len(rows)} {done_so} in {file.path}{goes_on}",
                  file=sys.stderr)  # fmt: skip
            raise typer.Exit(INTERRUPTED) from None
