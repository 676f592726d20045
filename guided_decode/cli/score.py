"""`guided-decode score`: values or rewards of a file of chats, one line each, resumable."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chat_scores import ChatScorer
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import DEFAULT_SCORER, load_tokenizer, open_scorer
from guided_decode.cli.errors import report
from guided_decode.cli.score_rows import read_rows
from guided_decode.cli.score_run import Job, identity, open_output, score_rest

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
    settings = {"format": text_format, "per_token": per_token}
    run = identity(scorer, reading, device, dtype, settings)
    with open_output(source, output, rows, run, overwrite) as file:
        if file.done < len(rows):
            tokenizer = load_tokenizer(
                scorer,
                scorer,
                adapter=reading.adapter,
                revision=reading.revision,
                trust_remote_code=reading.trust_remote_code,
            )
            critic = open_scorer(scorer, reading, device=device, dtype=dtype)
            file.begin()
            chats = ChatScorer(critic, tokenizer, text_format)
            job = Job(partial(chats.score, per_token=per_token), run, skip)
            score_rest(job, rows, file, batch_size)
        scored = len(rows) - file.failed
        print(f"{scored} chats are scored in {file.path}", file=sys.stderr)
        if file.failed:
            report(f"{file.failed} of {len(rows)} could not be scored")
            raise typer.Exit(1)
