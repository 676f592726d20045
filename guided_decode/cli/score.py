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
from guided_decode.cli.chat_scores import ChatScorer
from guided_decode.cli.chats import Messages, read_messages
from guided_decode.cli.checkpoints import DEFAULT_SCORER, load_tokenizer, open_scorer
from guided_decode.cli.errors import INTERRUPTED, Refusal
from guided_decode.cli.prompts_in import read_jsonl
from guided_decode.cli.scored_file import ScoredFile, line_key


@dataclass(frozen=True, slots=True)
class Chat:
    """One line of the input, by its number."""

    number: int
    name: Any
    messages: Messages
    key: str


Source = Annotated[
    Path, typer.Argument(metavar="INPUT", help="JSONL: messages, or prompt and response")
]
Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="JSONL: one line for each; kept and continued")
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
    reading: models.ScorerOptions = _AS_IT_IS,
    per_token: PerToken = False,
    batch_size: BatchSize = 16,
    overwrite: Overwrite = False,
) -> None:
    """Score the last response of each chat of a file. Run again, it goes on where it stopped."""
    chats = _read_chats(source, scorer, *reading.given().items(), per_token)
    if output.exists() and source.samefile(output):
        raise Refusal(f"{output} is the input: pass another file for the output")
    with ScoredFile(output, [chat.key for chat in chats], overwrite=overwrite) as file:
        if file.done < len(chats):
            critic = ChatScorer(
                open_scorer(scorer, reading, device=device, dtype=dtype),
                load_tokenizer(
                    scorer,
                    scorer,
                    revision=reading.revision,
                    trust_remote_code=reading.trust_remote_code,
                ),
                find(scorer),
            )
            _score_rest(critic, chats, file, per_token=per_token, batch_size=batch_size)
        print(f"{len(chats)} chats are scored in {output}", file=sys.stderr)


def _read_chats(source: Path, *settings: object) -> list[Chat]:
    """All chats of the input; each broken line is found before anything is scored."""
    chats = []
    for number, line, given in read_jsonl(source):
        try:
            messages = read_messages(given)
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                raise Refusal("expected a chat that ends with an assistant's response")
        except Refusal as error:
            raise Refusal(f"{source}, line {number}: {error}") from error
        name = given.get("id") if isinstance(given, dict) else None
        chats.append(Chat(number, name, messages, line_key(line, *settings)))
    return chats


def _score_rest(
    critic: ChatScorer, chats: list[Chat], file: ScoredFile, *, per_token: bool, batch_size: int
) -> None:
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    done, console = file.done, Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=len(chats), completed=done)
        try:
            for begin in range(done, len(chats), batch_size):
                batch = chats[begin : begin + batch_size]
                for lines in _score_batch(critic, batch, per_token):
                    file.append(lines)
                    done += len(lines)
                    progress.update(bar, completed=done)
        except KeyboardInterrupt:
            progress.stop()
            print(f"interrupted: {done} of {len(chats)} chats are scored in {file.path}; "
                  "the same command goes on from there", file=sys.stderr)  # fmt: skip
            raise typer.Exit(INTERRUPTED) from None


def _score_batch(
    critic: ChatScorer, batch: list[Chat], per_token: bool
) -> Iterator[list[dict[str, Any]]]:
    """The batch's output lines; one by one where a chat of it cannot be scored."""
    try:
        answers = critic.score([chat.messages for chat in batch], per_token=per_token)
    except (ValueError, Refusal) as error:
        if len(batch) == 1:
            raise Refusal(f"line {batch[0].number} cannot be scored: {error}") from error
        # What comes before the chat that cannot be scored is worth keeping.
        for chat in batch:
            yield from _score_batch(critic, [chat], per_token)
        return
    yield [_line(chat, answer) for chat, answer in zip(batch, answers, strict=True)]


def _line(chat: Chat, answer: dict[str, Any]) -> dict[str, Any]:
    name = {} if chat.name is None else {"id": chat.name}
    return {"line": chat.number, **name, **answer, "key": chat.key}
