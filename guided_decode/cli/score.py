"""`guided-decode score`: values or rewards of a file of chats, one line each, resumable."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chat_scores import ChatScorer
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import (
    DEFAULT_SCORER,
    NOT_REMOTE,
    Policy,
    follow_if_not_leading,
    known_as,
    load_tokenizer,
    open_none,
    open_scorer,
)
from guided_decode.cli.errors import Refusal, report
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement
from guided_decode.cli.run_identity import fingerprint, run_identity
from guided_decode.cli.score_rows import read_rows
from guided_decode.cli.score_run import Job, identity, open_output, score_rest
from guided_decode.scoring.remote.address import is_address

if TYPE_CHECKING:
    from guided_decode.scorer import Scorer as LoadedScorer

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
Scorer = Annotated[
    str, typer.Option(help="folder, registered name, Hub id, or a scorer server's address")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="whose ids the scorer reads \\[its own; with a server, needed]")
]
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
    remote: RemoteOptions = NOT_REMOTE,
    tokenizer: Tokenizer = None,
    per_token: PerToken = False,
    batch_size: BatchSize = 16,
    on_error: row_options.OnError = row_options.Failing.STOP,
    overwrite: Overwrite = False,
) -> None:
    """Score the last response of each chat of a file. Run again, it goes on where it stopped.

    The output is locked (flock) while it is written.
    """
    follow_if_not_leading(scorer, reading, dtype)
    skip = on_error is row_options.Failing.SKIP
    rows = read_rows(source, skip=skip)
    served = _served(scorer, tokenizer, reading, remote, device, dtype)
    text_format = format_of(prompt_format, find(scorer if served is None else known_as(served, "")))
    settings: dict[str, Any] = {"format": text_format, "per_token": per_token}
    if tokenizer is not None:
        settings["tokenizer"] = fingerprint(tokenizer)
    if served is None:
        run = identity(scorer, reading, device, dtype, settings)
    else:
        # Of its weights a server says their name.
        run = run_identity({}, {"served": getattr(served, "described", None), **settings}, None)
    with open_output(source, output, rows, run, overwrite) as file:
        if file.done < len(rows):
            ids = load_tokenizer(
                tokenizer or scorer,
                tokenizer or scorer,
                adapter=None if tokenizer else reading.adapter,
                revision=None if tokenizer else reading.revision,
                trust_remote_code=reading.trust_remote_code,
                gguf_file=None if tokenizer else reading.gguf_file,
            )
            critic = served or open_scorer(
                scorer, reading, device=device, dtype=dtype, remote=remote
            )
            file.begin()
            chats = ChatScorer(critic, ids, text_format)
            job = Job(partial(chats.score, per_token=per_token), run, skip)
            score_rest(job, rows, file, batch_size)
        else:
            open_none(reading)
        scored = len(rows) - file.failed
        print(f"{scored} chats are scored in {file.path}", file=sys.stderr)
        if file.failed:
            report(f"{file.failed} of {len(rows)} could not be scored")
            raise typer.Exit(1)


def _served(
    scorer: str,
    tokenizer: str | None,
    reading: models.ScorerOptions,
    remote: RemoteOptions,
    device: str | None,
    dtype: str,
) -> LoadedScorer | None:
    """The scorer of a server; None where a model was named."""
    if not is_address(scorer):
        return None
    if tokenizer is None:
        raise Refusal(
            f"--scorer {scorer} reads token ids, which are written here: pass --tokenizer, the "
            "folder, registered name or Hub id of its model"
        )
    refuse_placement(scorer, device=device, dtype=None if dtype == "auto" else dtype)
    own = load_tokenizer(tokenizer, tokenizer, trust_remote_code=reading.trust_remote_code)
    # Whoever writes the ids is held to the server's tokenizer, as a policy is.
    return open_scorer(scorer, reading, policy=Policy(tokenizer, None, own, None), remote=remote)
