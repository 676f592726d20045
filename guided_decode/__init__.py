"""Value-guided decoding: the critic of a PPO run at work while its policy decodes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout kernels/ and integrations/ stand beside this package, in a wheel inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

from guided_decode.config import GuidanceConfig
from guided_decode.guidance import guide
from guided_decode.prefix import PrefixHandle
from guided_decode.scores import Scores

if TYPE_CHECKING:
    from guided_decode.loading import load_scorer

__all__ = ["GuidanceConfig", "PrefixHandle", "Scores", "guide", "load_scorer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports transformers, which takes seconds, when a scorer is first asked for."""
    if name == "load_scorer":
        from guided_decode.loading import load_scorer

        return load_scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
