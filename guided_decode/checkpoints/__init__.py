"""How a name, a folder or a model in memory becomes a scorer, by its trainer's conventions.

Conventions are records (`families`), known checkpoints are records (`registry`); what does not
fit is refused with both sides named.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "FAMILIES",
    "REGISTRY",
    "Family",
    "Record",
    "find",
    "load_scorer",
]

if TYPE_CHECKING:
    from guided_decode.checkpoints.families import FAMILIES, Family
    from guided_decode.checkpoints.loading import load_scorer
    from guided_decode.checkpoints.registry import REGISTRY, Record, find
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "FAMILIES": "families",
            "Family": "families",
            "REGISTRY": "registry",
            "Record": "registry",
            "find": "registry",
            "load_scorer": "loading",
        },
    )
