"""Value-guided decoding: the critic of a PPO run at work while its policy decodes."""

from pathlib import Path
from typing import TYPE_CHECKING

# In a checkout kernels/ and integrations/ stand beside this package, in a wheel inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

from guided_decode.public_names import handed_on

__all__ = [
    "Adapted",
    "GuidanceConfig",
    "PrefixHandle",
    "Scorer",
    "Scores",
    "guide",
    "load_scorer",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from guided_decode.checkpoints.adapted import Adapted
    from guided_decode.checkpoints.loading import load_scorer
    from guided_decode.guidance.config import GuidanceConfig
    from guided_decode.guidance.rule import guide
    from guided_decode.prefix import PrefixHandle
    from guided_decode.scorer import Scorer, Scores
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "Adapted": "checkpoints.adapted",
            "GuidanceConfig": "guidance.config",
            "PrefixHandle": "prefix",
            "Scorer": "scorer",
            "Scores": "scorer",
            "guide": "guidance.rule",
            "load_scorer": "checkpoints.loading",
        },
    )
