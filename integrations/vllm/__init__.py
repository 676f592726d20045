"""vLLM: one processor for both model runners.

    vllm serve POLICY \\
        --logits-processors guided_decode.integrations.vllm:ValueGuidedLogitsProcessor \\
        --additional-config '{"guided_decode": {"scorer": "CRITIC", "kind": "ppo-critic"}}'

Requests ask for guidance in `vllm_xargs` (`extra_args` of `SamplingParams`); all others get the
tokens that they would get without it.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["ValueGuidedLogitsProcessor"]

# The processor's module imports vLLM; those of the configuration do without.
if TYPE_CHECKING:
    from guided_decode.integrations.vllm.processor import ValueGuidedLogitsProcessor
else:
    __getattr__, __dir__ = handed_on(__name__, {"ValueGuidedLogitsProcessor": "processor"})
