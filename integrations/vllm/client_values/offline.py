"""Values of responses that an engine in this process gave.

llm = LLM(POLICY, logits_processors=[...], additional_config={...}, worker_extension_cls=
          "guided_decode.integrations.vllm.client_values.worker.ValuesOfWorker")
name = secrets.token_hex(16)
asked = {"guide": 1, "guide_values": 1, "guide_values_id": name}
outputs = llm.generate(prompts, SamplingParams(extra_args=asked))
values = take_values(llm, outputs, name)
"""

from collections.abc import Sequence
from typing import Any

from guided_decode.integrations.vllm.client_values.records import (
    Known,
    TokenValues,
    decoded,
    token_values,
)
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from guided_decode.integrations.vllm.client_values.worker import METHOD, refuse_unreadable


def take_values(llm: Any, outputs: Sequence[Any], name: str) -> list[list[TokenValues]]:
    """What the worker kept of requests that ended; once, for it is then forgotten there.

    Args:
        llm: vLLM's LLM.
        outputs: what its `generate` or `chat` gave.
        name: their guide_values_id; several requests may share one. What waits for more than 64 MiB
            is dropped, the oldest first.

    Returns:
        For each output, for each of its samples: values and advantages of its token_ids.

    Raises ValueError: the engine was not started with the worker extension, or is one of many.
    """
    refuse_unreadable(llm.llm_engine.vllm_config.parallel_config)
    known = Known()
    for data in llm.collective_rpc(METHOD, args=([name],)):
        known.add(decoded(data).get(name, []))
    return [
        [_of(known, output.prompt_token_ids, sample.token_ids) for sample in output.outputs]
        for output in outputs
    ]


def _of(known: Known, prompt: Sequence[int], tokens: Sequence[int]) -> TokenValues:
    return token_values(known, GrowingText(prompt).digests_before(tokens), tokens)
