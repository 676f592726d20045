"""Kernels: one operation a file, with the torch reference that specifies it."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from guided_decode.kernels.guide_logits import guide_logits
from guided_decode.kernels.guide_sample import guide_sample
from guided_decode.kernels.gumbel import gumbel_noise
from guided_decode.kernels.lm_head_value import lm_head_value
from guided_decode.kernels.lookahead_attention import lookahead_attention
from guided_decode.kernels.top_candidates import top_candidates
from guided_decode.kernels.value_head import value_head

__all__ = [
    "guide_logits",
    "guide_sample",
    "gumbel_noise",
    "lm_head_value",
    "lookahead_attention",
    "top_candidates",
    "value_head",
]


def _give_way() -> None:
    """Puts Hugging Face's library `kernels`, where it is installed, in this package's place."""
    checkouts = {p for p in sys.path if Path(p, "kernels", "guide_logits.py").exists()}
    spec = PathFinder.find_spec(__name__, [p for p in sys.path if p not in checkouts])
    if spec is not None and spec.loader is not None:
        library = importlib.util.module_from_spec(spec)
        sys.modules[__name__] = library
        spec.loader.exec_module(library)


# Ours is guided_decode.kernels: under this name a script in a checkout's root asks for the library.
if __name__ == "kernels":
    _give_way()
