"""The options that name models and where they run, shared by commands."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Models"
_NAME = "folder, registered name or Hub id"

Policy = Annotated[
    str | None,
    typer.Option(help=f"{_NAME} \\[the scorer's, or tiny-tulu-sft]", rich_help_panel=_PANEL),
]
Scorer = Annotated[
    str | None,
    typer.Option(help=f"{_NAME} \\[the policy's, or tiny-tulu-value]", rich_help_panel=_PANEL),
]
Kind = Annotated[str, typer.Option(help="the scorer's family", rich_help_panel=_PANEL)]
Reference = Annotated[
    str | None, typer.Option(help="of an implicit reward's policy", rich_help_panel=_PANEL)
]
Device = Annotated[str | None, typer.Option(help="\\[a GPU if any]", rich_help_panel=_PANEL)]
ScorerDevice = Annotated[str | None, typer.Option(help="\\[--device]", rich_help_panel=_PANEL)]
Dtype = Annotated[
    str,
    typer.Option(
        help="of the weights", metavar="auto|float32|bfloat16|float16", rich_help_panel=_PANEL
    ),
]
