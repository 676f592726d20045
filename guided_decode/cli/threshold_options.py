"""The options of `calibrate` that find a threshold from rollouts, in the place of a beta."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from guided_decode.cli.errors import Refusal


def _option(text: str, *names: str, metavar: str | None = None, **own: Any) -> Any:
    return typer.Option(*names, help=text, metavar=metavar,
                        rich_help_panel="Thresholds by rollouts", **own)  # fmt: skip


Abstain = Annotated[bool, _option("find the value below which a response is ended", "--abstain")]
Margin = Annotated[bool, _option("find the margin of --rule prune", "--margin")]
Alpha = Annotated[
    float | None, _option("share of the good responses that may ever be interrupted", metavar="A")
]
Rollouts = Annotated[
    Path | None,
    _option("JSONL: prompt or messages, response or token ids, reward; of the decoding that the "
            "threshold is for; - is stdin", metavar="FILE")]  # fmt: skip
AbstainAfter = Annotated[
    int, _option("tokens that a response has before --abstain reads its value", min=1)
]
GoodAbove = Annotated[
    float | None,
    _option("a response is good whose reward is above this \\[between two rewards, else the "
            "median]", metavar="REWARD")]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ThresholdOptions:
    """What is found, and from what."""

    abstain: Abstain = False
    margin: Margin = False
    alpha: Alpha = None
    rollouts: Rollouts = None
    abstain_after: AbstainAfter = 1
    good_above: GoodAbove = None

    @property
    def wanted(self) -> bool:
        """Whether a threshold is asked for; raises Refusal: by halves, or two."""
        if self.abstain and self.margin:
            raise Refusal("--abstain and --margin came together, each of which may interrupt a "
                          "share alpha: find one, then the other")  # fmt: skip
        given = {"--alpha": self.alpha, "--rollouts": self.rollouts}
        if not (self.abstain or self.margin):
            for name, value in {**given, "--good-above": self.good_above}.items():
                if value is not None:
                    raise Refusal(f"{name} {value} came without --abstain or --margin, which it "
                                  "is for")  # fmt: skip
            return False
        missing = [name for name, value in given.items() if value is None]
        if missing:
            what = "--abstain" if self.abstain else "--margin"
            raise Refusal(f"{what} came without {' and '.join(missing)}: expected both, such as "
                          "--alpha 0.05 --rollouts FILE")  # fmt: skip
        return True

    @property
    def named(self) -> str:
        """The setting that is found."""
        return "abstain" if self.abstain else "margin"
