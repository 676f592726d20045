"""The options that bound what clients of a scorer server may take."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from guided_decode.serving.limits import Limits


def _limit(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Limits of clients")


WaitingTokens = Annotated[int | None, _limit("tokens that may wait; more are refused \\[1048576]")]
MessageBytes = Annotated[
    int | None, _limit("of one frame; a client that sends more is cut off \\[67108864]")
]
Sessions = Annotated[int | None, _limit("prefixes whose tokens are kept \\[4096]")]
SessionTokens = Annotated[int | None, _limit("tokens of all of them together \\[33554432]")]
SessionSeconds = Annotated[
    float | None, _limit("a prefix goes that was not used for so long \\[600]")
]
RoundTokens = Annotated[
    int | None, _limit("tokens of one round of scoring, which clients share \\[8192]")
]


@dataclass(frozen=True, slots=True)
class ScorerLimits:
    """What was given, by the names of the options."""

    max_waiting_tokens: WaitingTokens = None
    max_message_bytes: MessageBytes = None
    max_sessions: Sessions = None
    max_session_tokens: SessionTokens = None
    session_seconds: SessionSeconds = None
    round_tokens: RoundTokens = None

    def limits(self) -> Limits:
        """The server's limits. Raises ValueError: one of them is none."""
        from guided_decode.serving.limits import Limits

        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Limits(**{name: value for name, value in own.items() if value is not None})
