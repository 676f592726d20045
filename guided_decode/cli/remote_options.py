"""The options of commands whose scorer may be on a scorer server."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from guided_decode.cli.errors import Refusal
from guided_decode.cli.judge_options import pooling_urls
from guided_decode.scoring.remote.address import is_address

_PANEL = "Models"

KeyFile = Annotated[
    str | None,
    typer.Option(help="of a scorer server that wants keys", rich_help_panel=_PANEL),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        help="seconds that an answer of a scorer server may take \\[60]", rich_help_panel=_PANEL
    ),
]


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How a scorer server is met: what `load_scorer` takes with an address alone."""

    key_file: KeyFile = None
    timeout: Timeout = None

    def given(self) -> dict[str, Any]:
        """What was given, by name."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in own.items() if value is not None}


def refuse_placement(scorer: str, **flags: str | None) -> None:
    """Raises Refusal: a device or dtype was given for a scorer that its server has placed."""
    given = [f"--{name.replace('_', '-')} {value}" for name, value in flags.items() if value]
    if given and (is_address(scorer) or pooling_urls(scorer)):
        raise Refusal(
            f"{' and '.join(given)} came with {scorer}, whose server has placed its scorer: give "
            "it to guided-decode scorer, and drop it here"
        )


def refuse_unmet(scorer: str | None, remote: RemoteOptions) -> None:
    """Raises Refusal: it was said how a server is met, and the scorer is on none."""
    if scorer is not None and (is_address(scorer) or pooling_urls(scorer)):
        return
    for name, value in remote.given().items():
        what = "a method that asks no scorer" if scorer is None else f"--scorer {scorer}"
        raise Refusal(f"--{name.replace('_', '-')} {value} came with {what}, and is for a scorer "
                      "on a server (tcp://HOST:PORT): drop it")  # fmt: skip
