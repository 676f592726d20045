"""What a check found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended; only a failure keeps guidance from working."""

    OK = "ok"
    ABSENT = "absent"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """check: what was looked at. said: what is so. advice: what to do, where there is something.

    seconds: that the check took.
    """

    check: str
    status: Status
    said: str
    advice: str = ""
    seconds: float = 0.0

    def changed(self, **fields: Any) -> Finding:
        return replace(self, **fields)

    def as_dict(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "status": str(self.status),
            "said": self.said,
            "advice": self.advice or None,
            "seconds": round(self.seconds, 1),
        }


def works(findings: Sequence[Finding]) -> bool:
    """Whether guidance works wherever something was found for it to work in."""
    return all(each.status != Status.FAILURE for each in findings)


def as_text(findings: Sequence[Finding]) -> str:
    """The findings as plain text, to be pasted into an issue."""
    width = max(len(each.check) for each in findings)
    lines = []
    for each in findings:
        status = "FAILURE" if each.status == Status.FAILURE else str(each.status)
        lines.append(f"{each.check:<{width}}  {status:<7}  {each.said}")
        if each.advice:
            lines.append(f"{'':<{width}}  {'':<7}  -> {each.advice}")
    failed = [each.check for each in findings if each.status == Status.FAILURE]
    last = f"guidance does not work here: see {', '.join(failed)}" if failed else (
        "guidance works here")  # fmt: skip
    return "\n".join([*lines, "", last])
