"""Hugging Face `generate`: a logits processor, and the `custom_generate` route.

    model.generate(**inputs, custom_generate=GuidedDecoding(scorer, config))

knows the attention mask, the prompt's width, the terminals and the number of beams. The bare
processor, `logits_processor=[ValueGuidedLogitsProcessor(scorer, config)]`, has to be told.
"""

from guided_decode.integrations.custom_generate import GuidedDecoding
from guided_decode.integrations.logits_processor import ValueGuidedLogitsProcessor

__all__ = ["GuidedDecoding", "ValueGuidedLogitsProcessor"]
