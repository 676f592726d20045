"""Hugging Face `generate`: a logits processor, and the `custom_generate` route.

    model.generate(**inputs, custom_generate=GuidedDecoding(scorer, config))

knows the attention mask, the prompt's width, the terminals and the number of beams. The bare
processor, `logits_processor=[ValueGuidedLogitsProcessor(scorer, config)]`, has to be told.
Where the scorer is a head on the policy's own hidden states,

    model.generate(**inputs, custom_generate=TrunkLookahead(scorer, config))

runs one forward a token, which scores the candidates and is the next step of the policy;
`join_weights(policy)`, before the scorer is loaded, makes it a few launches shorter. A row of
which the scorer expects nothing more is ended by `abstain` of its config, or unguided by

    model.generate(**inputs, stopping_criteria=[AbstentionCriteria(scorer, config)])
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "AbstentionCriteria",
    "GuidedDecoding",
    "TrunkLookahead",
    "ValueGuidedLogitsProcessor",
    "join_weights",
]

if TYPE_CHECKING:
    from guided_decode.integrations.transformers.abstention import AbstentionCriteria
    from guided_decode.integrations.transformers.custom_generate import GuidedDecoding
    from guided_decode.integrations.transformers.joined_weights import join_weights
    from guided_decode.integrations.transformers.logits_processor import ValueGuidedLogitsProcessor
    from guided_decode.integrations.transformers.trunk_lookahead import TrunkLookahead
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "AbstentionCriteria": "abstention",
            "GuidedDecoding": "custom_generate",
            "TrunkLookahead": "trunk_lookahead",
            "ValueGuidedLogitsProcessor": "logits_processor",
            "join_weights": "joined_weights",
        },
    )
