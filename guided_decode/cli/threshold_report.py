"""What `calibrate --abstain` and `--margin` say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from guided_decode.guidance.config import GuidanceConfig

if TYPE_CHECKING:
    from guided_decode.lab.calibration.conformal import Threshold
    from guided_decode.lab.calibration.trajectories import Share


@dataclass(frozen=True, slots=True)
class Group:
    """What becomes of some responses under the threshold. held_out: of the other file."""

    good: bool
    held_out: bool
    share: Share


@dataclass(frozen=True, slots=True)
class ThresholdReport:
    """A threshold, and what it does.

    setting: "abstain" or "margin". rollouts, prompts: in the file; of each prompt one is used.
    good_above: rewards above it are good. bad: how many of those used are none. written_by: how
    the rollouts have to have been decoded for the bound to hold.
    """

    setting: str
    alpha: float
    threshold: Threshold
    after: int
    rollouts: int
    prompts: int
    bad: int
    good_above: float
    groups: Sequence[Group]
    written_by: str | None = None

    def sentence(self) -> str:
        """What was found, and from what."""
        one, of = self.threshold, self.threshold.of
        if self.setting == "abstain":
            what = f"the {_nth(one.rank)} smallest of the lowest values along {of} good responses"
            what += f", read from token {self.after} on"
        else:
            what = f"the {_nth(one.rank)} largest of the largest gaps along {of} good responses"
        return f"{self.setting} {one.value!r}: {what}"

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.rollouts:,} rollouts of {self.prompts:,} prompts, of each prompt one: "
            f"{self.threshold.of:,} good (reward above {self.good_above:g}), {self.bad:,} bad",
            self.sentence(),
            f"of good responses like these at most {self.alpha:g} are ever interrupted",
            *([] if self.written_by is None else [f"if the rollouts were {self.written_by}"]),
            "",
            "responses            number  interrupted           95%"
            + ("  tokens saved" if self.setting == "abstain" else ""),
        ]
        return "\n".join(lines + [self._line(each) for each in self.groups])

    def _line(self, group: Group) -> str:
        own, interval = group.share, group.share.interval
        name = f"{'good' if group.good else 'bad'}, {'held out' if group.held_out else 'used'}"
        line = f"{name:<20}  {own.of:>5}"
        if interval is None:
            return line
        between = f"{interval[0]:.1%}–{interval[1]:.1%}"
        line += f"  {own.share:>11.1%}  {between:>12}"
        return line + (f"  {own.saved_share:>12.1%}" if self.setting == "abstain" else "")

    def as_dict(self, settings: dict[str, Any]) -> dict[str, Any]:
        """By name, for JSON."""
        found: dict[str, Any] = {
            self.setting: self.threshold.value,
            "alpha": self.alpha,
            "rank": self.threshold.rank,
            "good": self.threshold.of,
            "bad": self.bad,
            "rollouts": self.rollouts,
            "prompts": self.prompts,
            "good_above": self.good_above,
        }
        if self.setting == "abstain":
            found["abstain_after"] = self.after
        found["groups"] = [
            {
                "good": each.good,
                "held_out": each.held_out,
                "responses": each.share.of,
                "interrupted": each.share.interrupted,
                "share": _or_none(each.share.share),
                "tokens": each.share.tokens,
                "tokens_saved": each.share.saved,
            }
            for each in self.groups
        ]
        return {**found, "settings": settings}

    def head(self) -> list[str]:
        """Comments of a file of settings."""
        end = "" if self.written_by is None else f",\n# if the rollouts were {self.written_by}"
        return [
            f"# guided-decode calibrate --{self.setting}: {self.sentence()};",
            f"# of good responses like these at most {self.alpha:g} are ever interrupted{end}.",
        ]


def guidance_in_words(config: GuidanceConfig) -> str:
    """How responses were decoded to which a bound found beside this guidance applies."""
    if not config.guides:
        return "sampled from the policy without guidance"
    default = asdict(GuidanceConfig())
    given = {n: each for n, each in asdict(config).items() if n == "beta" or each != default[n]}
    return "written under this guidance: " + ", ".join(f"{n} {v}" for n, v in given.items())


def _nth(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 * (number % 100 not in (11, 12, 13)), "th")
    return f"{number}{ending}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
