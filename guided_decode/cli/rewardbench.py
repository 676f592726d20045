"""`guided-decode rewardbench`: pairwise accuracy of a scorer on RewardBench's pairs."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.bench_pairs import PairReader, Read, as_pairs, read_pairs
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import (
    follow_if_not_leading,
    load_tokenizer,
    open_none,
    open_scorer,
)
from guided_decode.cli.picture import checked_picture
from guided_decode.cli.score_run import Job, identity, open_output, score_rest
from guided_decode.cli.terminal import console

if TYPE_CHECKING:
    from guided_decode.lab.rewardbench.outcome import Count, Outcome
    from guided_decode.scorer import Scorer


class ReadAt(StrEnum):
    """Where a score is read."""

    EOS = "eos"
    LAST = "last"


Model = Annotated[
    str, typer.Option("--model", help="reward model, critic or implicit reward: folder, registered "
                      "name or Hub id")]  # fmt: skip
Data = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="JSONL with the data set's columns; "
                       "- is stdin")]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSONL: a line for each pair; kept, and continued"),
]
Where = Annotated[
    ReadAt | None,
    typer.Option("--read", help="a score's token: EOS, or the last of the turn as its format ends "
                 "it, as the published numbers were read \\[last; eos for critics]")]  # fmt: skip
MaxLength = Annotated[
    int, typer.Option(min=2, help="tokens; of what is longer the beginning is cut")
]
Partial = Annotated[
    bool, typer.Option("--partial", help="the file may lack subsets, or pairs of them")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="a picture of the prefix accuracies")
]
Json = Annotated[bool, typer.Option("--json", help="all figures as one JSON object")]
BatchSize = Annotated[int, typer.Option(min=1, help="pairs of one call")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="begin the output again")]
_AS_IT_IS = models.ScorerOptions()


def rewardbench(
    model: Model,
    data: Data,
    output: Output = None,
    read: Where = None,
    max_length: MaxLength = 2048,
    partial: Partial = False,
    plot: Plot = None,
    as_json: Json = False,
    device: models.Device = None,
    dtype: models.Dtype = "auto",
    prompt_format: row_options.PromptFormat = None,
    reading: models.ScorerOptions = _AS_IT_IS,
    batch_size: BatchSize = 16,
    overwrite: Overwrite = False,
) -> None:
    """Rank RewardBench's pairs: accuracy by subset, section and overall, and of prefixes.

    Prefix accuracy is that of the values after 25, 50, 75 and 100% of each response.
    """
    from guided_decode.lab.rewardbench.outcome import Outcome

    follow_if_not_leading(model, reading, dtype)
    picture = None if plot is None else checked_picture(plot)
    rows = read_pairs(data, partial=partial)
    text_format = format_of(prompt_format, find(model))
    settings = {"format": text_format, "read": read, "max_length": max_length, "bench": True}
    run = identity(model, reading, device, dtype, settings)
    with ExitStack() as opened:
        if output is None:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            output = Path(folder) / "pairs.jsonl"
        file = open_output(data, output, rows, run, overwrite)
        opened.enter_context(file)
        if file.done < len(rows):
            tokenizer = load_tokenizer(
                model, model, adapter=reading.adapter, revision=reading.revision,
                trust_remote_code=reading.trust_remote_code, gguf_file=reading.gguf_file,
            )  # fmt: skip
            scorer = open_scorer(model, reading, device=device, dtype=dtype)
            file.begin()
            where = cast(Read, read or _published(scorer))
            reader = PairReader(scorer, tokenizer, text_format, where, max_length)
            score_rest(Job(reader.answer, run, skip=False), rows, file, batch_size)
        else:
            open_none(reading)
        lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    outcome = Outcome.of(as_pairs(lines))
    if picture is not None:
        from guided_decode.lab.rewardbench.plot import draw

        draw(outcome, model, picture)
    if as_json:
        print(json.dumps({"model": model, **outcome.as_dict()}, indent=2))
    else:
        _print(outcome)


def _published(scorer: Scorer) -> Read:
    """Where the published numbers were read. A critic was never trained at EOS or behind it."""
    return "eos" if scorer.terminal == "baseline" else "last"


def _print(outcome: Outcome) -> None:
    from guided_decode.lab.rewardbench import protocol

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for header in ("subset", "accuracy", "95%", "ties", "pairs"):
        table.add_column(header, justify="left" if header == "subset" else "right", no_wrap=True)
    sections = outcome.sections
    for section in (*protocol.SECTIONS, protocol.PRIOR_SETS):
        own = [one.name for one in protocol.members(section) if one.name in outcome.subsets]
        if not own:
            continue
        score = f"{sections[section]:.1%}" if section in sections else "not whole"
        table.add_row(f"[bold]{section}[/]", f"[bold]{score}[/]", "", "", "")
        for name in own:
            table.add_row(f"  {name}", *_cells(outcome.subsets[name]))
    out = console()
    out.print(table)
    card, board = protocol.model_card_score(sections), protocol.leaderboard_score(sections)
    if card is not None:
        out.print(f"overall, mean of four sections (model cards): {card:.1%}")
    if board is not None:
        out.print(f"overall, weighted with Prior Sets (leaderboard): {board:.1%}")
    if not (counts := {part: one for part, one in outcome.prefixes.items() if one.of}):
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for header in ("of each response read", "accuracy", "95%", "ties", "pairs"):
        table.add_column(header, justify="right", no_wrap=True)
    for part, count in counts.items():
        table.add_row(f"{part:.0%}", *_cells(count))
    out.print(table)


def _cells(count: Count) -> list[str]:
    low, high = count.interval
    return [f"{count.accuracy:.1%}", f"{low * 100:.0f}–{high * 100:.0f}", str(count.ties),
            str(count.of)]  # fmt: skip
