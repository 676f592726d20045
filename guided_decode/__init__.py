"""Value-guided decoding: the critic of a PPO run at work while its policy decodes."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout kernels/ and integrations/ stand beside this package, in a wheel inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from guided_decode.config import GuidanceConfig
    from guided_decode.guidance import guide
    from guided_decode.loading import load_scorer
    from guided_decode.prefix import PrefixHandle
    from guided_decode.scores import Scores

__all__ = ["GuidanceConfig", "PrefixHandle", "Scores", "guide", "load_scorer"]
__version__ = "0.1.0"

# torch and transformers take seconds to import: only what is asked for is.
_HOMES = {
    "GuidanceConfig": "config",
    "PrefixHandle": "prefix",
    "Scores": "scores",
    "guide": "guidance",
    "load_scorer": "loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
