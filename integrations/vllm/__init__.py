"""vLLM: one processor for both model runners.

    vllm serve POLICY \\
        --logits-processors guided_decode.integrations.vllm:ValueGuidedLogitsProcessor \\
        --additional-config '{"guided_decode": {"scorer": "CRITIC", "kind": "ppo-critic"}}'

Requests ask for guidance in `vllm_xargs` (`extra_args` of `SamplingParams`); all others get the
tokens that they would get without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_decode.integrations.vllm.processor import ValueGuidedLogitsProcessor

__all__ = ["ValueGuidedLogitsProcessor"]


def __getattr__(name: str) -> Any:
    """The processor, whose module imports vLLM; the configuration's modules do without."""
    if name != "ValueGuidedLogitsProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from guided_decode.integrations.vllm.processor import ValueGuidedLogitsProcessor

    return ValueGuidedLogitsProcessor
