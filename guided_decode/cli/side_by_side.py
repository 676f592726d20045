"""Responses beside each other, each token coloured by its value, each line with its last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

# From the lowest value to the highest; readable on dark and on light ground, and by the
# colour-blind.
SCALE = ("#d95f02", "#c4804a", "#8f8f8f", "#5a93b8", "#1f8fd6")


@dataclass(frozen=True, slots=True)
class ValuedText:
    """A response by tokens: their text, and the value of each (None where it means nothing).

    summed: the values are rewards of single tokens, whose sum so far is what V is elsewhere.
    """

    pieces: list[str]
    values: list[float | None]
    summed: bool = False

    @property
    def so_far(self) -> list[float | None]:
        """After each token, the last value, or the sum; None before the first."""
        known: list[float | None] = []
        for value in self.values:
            last = known[-1] if known else None
            if value is not None:
                last = value + (last or 0.0) if self.summed else value
            known.append(last)
        return known

    @property
    def last(self) -> float | None:
        return self.so_far[-1] if self.values else None


@dataclass(frozen=True, slots=True)
class ColourScale:
    """Colours for values between `low` and `high`."""

    low: float
    high: float

    @classmethod
    def over(cls, responses: Sequence[ValuedText]) -> ColourScale:
        """The scale that spans all values of the responses."""
        values = [v for response in responses for v in response.values if v is not None]
        return cls(min(values, default=0.0), max(values, default=0.0))

    def style(self, value: float | None) -> str:
        """The style of a token with that value."""
        if value is None or not self.high > self.low:
            return "dim"
        share = (value - self.low) / (self.high - self.low)
        return SCALE[min(int(share * len(SCALE)), len(SCALE) - 1)]

    def legend(self, summed: bool) -> Text:
        """What the colours and the numbers mean."""
        text = Text("value of a token ", style="dim")
        text.append(f"{self.low:.2f} ", style=SCALE[0])
        for colour in SCALE:
            text.append("██", style=colour)
        text.append(f" {self.high:.2f}", style=SCALE[-1])
        right = "the sum so far" if summed else "a line's last"
        return text.append(f"   at the right: {right}", style="dim")


def side_by_side(columns: Sequence[tuple[str, ValuedText]]) -> tuple[Table, Text]:
    """A table of titled responses, line beside line, and the legend of its colours."""
    scale = ColourScale.over([response for _, response in columns])
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for title, _ in columns:
        table.add_column(title, overflow="fold")
        table.add_column("value", justify="right", style="dim", no_wrap=True)
    for lines in zip_longest(*(_lines(response, scale) for _, response in columns)):
        table.add_row(*(cell for line in lines for cell in (line or ("", ""))))
    return table, scale.legend(any(response.summed for _, response in columns))


def _lines(response: ValuedText, scale: ColourScale) -> list[tuple[Text, str]]:
    """Each line of a response: its coloured text, and the value at its end."""
    lines: list[tuple[Text, str]] = []
    text, value = Text(), None
    for piece, own, value in zip(response.pieces, response.values, response.so_far, strict=True):
        head, *rest = piece.split("\n")
        text.append(head, scale.style(own))
        for part in rest:
            lines.append((text, _number(value)))
            text = Text(part, scale.style(own))
    if text.plain or not lines:
        lines.append((text, _number(value)))
    return lines


def _number(value: float | None) -> str:
    # Adding zero turns −0.0 into 0.0.
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"
