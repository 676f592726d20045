"""vLLM: one processor for both model runners, and a generator for searches.

    vllm serve POLICY \\
        --logits-processors guided_decode.integrations.vllm:ValueGuidedLogitsProcessor \\
        --additional-config '{"guided_decode": {"scorer": "CRITIC", "kind": "ppo-critic"}}'

Requests ask for guidance in `vllm_xargs` (`extra_args` of `SamplingParams`); all others get the
tokens that they would get without it. `VllmGenerator` lets `guided_decode.search` draw from an
engine in this process; `take_values` fetches the values that its worker kept for its user.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "ValueGuidedLogitsProcessor",
    "VllmGenerator",
    "load_vllm_generator",
    "take_values",
]

# These modules import vLLM; those of the configuration do without.
if TYPE_CHECKING:
    from guided_decode.integrations.vllm.client_values.offline import take_values
    from guided_decode.integrations.vllm.generator import VllmGenerator, load_vllm_generator
    from guided_decode.integrations.vllm.processor import ValueGuidedLogitsProcessor
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "ValueGuidedLogitsProcessor": "processor",
            "VllmGenerator": "generator",
            "load_vllm_generator": "generator",
            "take_values": "client_values.offline",
        },
    )
