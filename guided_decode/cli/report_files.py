"""A report card's files, and the values that it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from torch import Tensor

    from guided_decode.critics.rollout import Rollout
    from guided_decode.lab.report_card.card import ReportCard
    from guided_decode.scorer import Scorer

NAME = "report_card"


def bar(doing: str) -> Progress:
    """A progress bar on stderr, with the time that is left; nothing where nobody looks."""
    console = Console(stderr=True)
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)


def read_values(scorer: Scorer, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """V along rollouts, with a bar. Raises ValueError: as `values_along`."""
    from guided_decode.critics.values import values_along

    with bar("scoring") as progress:
        task = progress.add_task("rollouts", total=len(rollouts))
        return values_along(scorer, rollouts, done=lambda n: progress.update(task, completed=n))


def write_card(card: ReportCard, folder: Path, *, plot: bool) -> None:
    """Writes JSON, Markdown and, where it is wanted, a PNG. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if plot:
        from guided_decode.lab.report_card.plot import draw

        draw(card, folder / f"{NAME}.png")
    (folder / f"{NAME}.md").write_text(card.markdown(), encoding="utf-8")
    # Of the three the last: that it is there says that all are.
    text = json.dumps(card.as_dict(), indent=2, allow_nan=False)
    (folder / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
