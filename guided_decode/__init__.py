"""Value-guided decoding: the critic of a PPO run at work while its policy decodes."""

from guided_decode.config import GuidanceConfig
from guided_decode.guidance import guide
from guided_decode.prefix import PrefixHandle
from guided_decode.scores import Scores

__all__ = ["GuidanceConfig", "PrefixHandle", "Scores", "guide"]
__version__ = "0.1.0"
