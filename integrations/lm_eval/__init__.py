"""lm-evaluation-harness: guided decoding as a model of its, for generate_until tasks.

    python -m guided_decode.integrations.lm_eval --model guided-decode \\
        --model_args pretrained=POLICY,scorer=CRITIC,beta=2.0 --tasks gsm8k --apply_chat_template

is the harness's own command, which has no other way to learn of a model. In Python, `register()`
makes it known, or `lm_eval.simple_evaluate(model=GuidedLM(...))` takes one.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["GuidedLM", "register"]

if TYPE_CHECKING:
    from guided_decode.integrations.lm_eval.model import GuidedLM
    from guided_decode.integrations.lm_eval.registration import register
else:
    __getattr__, __dir__ = handed_on(__name__, {"GuidedLM": "model", "register": "registration"})
