"""The options of commands that read or write chats: format, failures, seed."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Failing(StrEnum):
    """What is done about a chat that fails."""

    STOP = "stop"
    SKIP = "skip"


PromptFormat = Annotated[
    str | None,
    typer.Option(
        help="of the chats \\[the checkpoint's, or its chat template]",
        metavar="tulu-2|tulu-3|halos|...|template",
    ),
]
OnError = Annotated[
    Failing, typer.Option(help="at a chat that fails: stop, or report it and go on (exit code 1)")
]
# What torch.manual_seed takes.
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="of sampling")]
