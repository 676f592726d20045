"""Kernels: one operation a file, with the torch reference that specifies it."""

from guided_decode.kernels.add_norm import add_norm
from guided_decode.kernels.gated_product import gated_product
from guided_decode.kernels.guide_logits import guide_logits
from guided_decode.kernels.gumbel import gumbel_noise
from guided_decode.kernels.lm_head_value import lm_head_value
from guided_decode.kernels.lookahead_attention import lookahead_attention
from guided_decode.kernels.norm_rows import norm_rows
from guided_decode.kernels.rotary_slots import rotary_slots
from guided_decode.kernels.sample_tokens import sample_tokens
from guided_decode.kernels.top_candidates import top_candidates
from guided_decode.kernels.value_head import value_head

__all__ = [
    "add_norm",
    "gated_product",
    "guide_logits",
    "gumbel_noise",
    "lm_head_value",
    "lookahead_attention",
    "norm_rows",
    "rotary_slots",
    "sample_tokens",
    "top_candidates",
    "value_head",
]
