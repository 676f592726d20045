"""`guided-decode score`: values or rewards of a file of chats, one line each, resumable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chat_scores import ChatScorer
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import (
    DEFAULT_SCORER,
    load_tokenizer,
    open_scorer,
    parse_dtype,
    pick_device,
)
from guided_decode.cli.errors import INTERRUPTED, Refusal, report, typed
from guided_decode.cli.jsonl import STDIN
from guided_decode.cli.run_identity import run_identity
from guided_decode.cli.score_rows import Row, read_rows
from guided_decode.cli.scored_file import ScoredFile, ScoredStream

STDOUT = STDIN
# What changes the cost of a score, or whether there is one, and not the score.
_SAME_SCORES = ("cache_tokens", "max_forward_tokens", "allow_pickle", "trust_remote_code")
Source = Annotated[
    Path,
    typer.Argument(metavar="INPUT", help="JSONL: messages, prompt and response, ...; - is stdin"),
]
Output = Annotated[
    Path,
    typer.Argument(
        metavar="OUTPUT", help="JSONL: one line for each; kept and continued; - is stdout"
    ),
]
Scorer = Annotated[str, typer.Option(help="folder, registered name or Hub id")]
PerToken = Annotated[
    bool, typer.Option("--per-token", help="the value of each token of the response, too")
]
BatchSize = Annotated[int, typer.Option(min=1, help="chats of one call")]
_AS_IT_IS = models.ScorerOptions()
Overwrite = Annotated[bool, typer.Option("--overwrite", help="begin again instead of going on")]


def score(
    source: Source,
    output: Output,
    scorer: Scorer = DEFAULT_SCORER,
    device: models.Device = None,
    dtype: models.Dtype = "auto",
    prompt_format: row_options.PromptFormat = None,
    reading: models.ScorerOptions = _AS_IT_IS,
    per_token: PerToken = False,
    batch_size: BatchSize = 16,
    on_error: row_options.OnError = row_options.Failing.STOP,
    overwrite: Overwrite = False,
) -> None:
    """Score the last response of each chat of a file. Run again, it goes on where it stopped.

    The output is locked (flock) while it is written.
    """
    skip = on_error is row_options.Failing.SKIP
    rows = read_rows(source, skip=skip)
    text_format = format_of(prompt_format, find(scorer))
    run = _identity(scorer, reading, device, dtype, text_format, per_token)
    with _open_output(source, output, rows, run, overwrite) as file:
        if file.done < len(rows):
            tokenizer = load_tokenizer(
                scorer,
                scorer,
                revision=reading.revision,
                trust_remote_code=reading.trust_remote_code,
            )
            critic = open_scorer(scorer, reading, device=device, dtype=dtype)
            file.begin()
            job = _Job(ChatScorer(critic, tokenizer, text_format), run, per_token, skip)
            _score_rest(job, rows, file, batch_size)
        scored = len(rows) - file.failed
        print(f"{scored} chats are scored in {file.path}", file=sys.stderr)
        if file.failed:
            report(f"{file.failed} of {len(rows)} could not be scored")
            raise typer.Exit(1)


def _identity(
    scorer: str,
    reading: models.ScorerOptions,
    device: str | None,
    dtype: str,
    text_format: str | None,
    per_token: bool,
) -> str:
    """What the run's scores follow from, by name; finds out that a model is not there."""
    given = reading.given()
    record = find(scorer)
    reference = reading.reference or (None if record is None else record.reference)
    others = {"head": reading.head, "reward": reading.reward, "reference": reference}
    on_cpu = pick_device(device).startswith("cpu")
    settled = parse_dtype(dtype) or ("float32" if on_cpu else dtype)
    settings = {
        name: value for name, value in given.items() if name not in (*others, *_SAME_SCORES)
    }
    settings |= {"dtype": str(settled).removeprefix("torch."), "format": text_format,
                 "per_token": per_token}  # fmt: skip
    return run_identity({"scorer": scorer, **others}, settings, reading.revision)


def _open_output(
    source: Path, output: Path, rows: list[Row], run: str, overwrite: bool
) -> ScoredFile | ScoredStream:
    if output == STDOUT:
        return ScoredStream()
    if source != STDIN and output.exists() and source.samefile(output):
        raise Refusal(f"{output} is the input: pass another file for the output")
    return ScoredFile(output, [row.key for row in rows], run, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class _Job:
    """How rows are scored. skip: what cannot be scored is reported, and the others go on."""

    critic: ChatScorer
    run: str
    per_token: bool
    skip: bool

    def lines(self, batch: list[Row]) -> Iterator[list[dict[str, Any]]]:
        """The batch's output lines; one by one where a row of it cannot be scored."""
        try:
            for row in batch:
                if row.problem is not None:
                    raise Refusal(row.problem)
            chats = [chat for row in batch for chat in row.chats]
            answers = iter(self.critic.score(chats, per_token=self.per_token))
        except (ValueError, Refusal) as error:
            if len(batch) == 1:
                yield [self._unscored(batch[0], error)]
                return
            # What comes before the row that cannot be scored is worth keeping.
            for row in batch:
                yield from self.lines([row])
            return
        yield [row.scored([next(answers) for _ in row.chats], self.run) for row in batch]

    def _unscored(self, row: Row, error: Exception) -> dict[str, Any]:
        message = f"{row.where} cannot be scored: {typed(error)}"
        if not self.skip:
            raise Refusal(message) from error
        report(message)
        return row.skipped(typed(error), self.run)


def _score_rest(
    job: _Job, rows: list[Row], file: ScoredFile | ScoredStream, batch_size: int
) -> None:
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    done, console = file.done, Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=len(rows), completed=done)
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
            print(f"interrupted: {done} of {len(rows)} chats are scored in {file.path}{goes_on}",
                  file=sys.stderr)  # fmt: skip
            raise typer.Exit(INTERRUPTED) from None
