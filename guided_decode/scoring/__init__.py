"""Who judges: a critic or reward model, an implicit reward, a head on the policy's own trunk.

Each answers `Scorer.score` by the cache and the packed forward, and says what its output means.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "CriticScorer",
    "ImplicitScorer",
    "LanguageModel",
    "NextLogits",
    "StepScorer",
    "Transform",
    "TrunkHead",
    "TrunkScorer",
    "ValueHead",
    "parse_transform",
]

if TYPE_CHECKING:
    from guided_decode.scoring.critic import CriticScorer, ValueHead
    from guided_decode.scoring.implicit import ImplicitScorer, LanguageModel
    from guided_decode.scoring.next_logits import NextLogits
    from guided_decode.scoring.step_scorer import StepScorer
    from guided_decode.scoring.transforms import Transform, parse_transform
    from guided_decode.scoring.trunk_head import TrunkHead
    from guided_decode.scoring.trunk_scorer import TrunkScorer
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "CriticScorer": "critic",
            "ImplicitScorer": "implicit",
            "LanguageModel": "implicit",
            "NextLogits": "next_logits",
            "StepScorer": "step_scorer",
            "Transform": "transforms",
            "TrunkHead": "trunk_head",
            "TrunkScorer": "trunk_scorer",
            "ValueHead": "critic",
            "parse_transform": "transforms",
        },
    )
