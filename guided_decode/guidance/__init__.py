"""The rule and the step: advantages of candidates, turned into a new next-token distribution.

`guide` is the mathematics over tensors; `guide_rows` asks a scorer first and decides what becomes
of rows whose scores fail.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "PRESETS",
    "GuidanceConfig",
    "guide",
    "guide_rows",
    "preset",
    "score_candidates",
    "select_candidates",
]

if TYPE_CHECKING:
    from guided_decode.guidance.candidates import select_candidates
    from guided_decode.guidance.config import GuidanceConfig
    from guided_decode.guidance.presets import PRESETS, preset
    from guided_decode.guidance.rule import guide
    from guided_decode.guidance.step import guide_rows
    from guided_decode.guidance.terminal import score_candidates
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "GuidanceConfig": "config",
            "PRESETS": "presets",
            "guide": "rule",
            "guide_rows": "step",
            "preset": "presets",
            "score_candidates": "terminal",
            "select_candidates": "candidates",
        },
    )
