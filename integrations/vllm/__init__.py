"""vLLM: one processor for both model runners.

    vllm serve POLICY \\
        --logits-processors guided_decode.integrations.vllm:ValueGuidedLogitsProcessor \\
        --additional-config '{"guided_decode": {"scorer": "CRITIC", "kind": "ppo-critic"}}'

Requests ask for guidance in `vllm_xargs` (`extra_args` of `SamplingParams`); all others get the
tokens that they would get without it.
"""

from guided_decode.integrations.vllm.processor import ValueGuidedLogitsProcessor

__all__ = ["ValueGuidedLogitsProcessor"]
