"""Kernels: one operation a file, with the torch reference that specifies it."""

from guided_decode.kernels.guide_logits import guide_logits
from guided_decode.kernels.value_head import value_head

__all__ = ["guide_logits", "value_head"]
