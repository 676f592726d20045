"""Tables on a terminal."""

from __future__ import annotations

from rich.console import Console


def console(at_least: int = 60) -> Console:
    """Stdout, as wide as its terminal is, but not so narrow that a table would lose figures.

    at_least: columns that the table needs; a terminal that has fewer breaks its lines itself.
    """
    own = Console()
    return own if own.width >= at_least else Console(width=at_least)
