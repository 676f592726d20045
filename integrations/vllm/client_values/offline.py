"""Values of responses that an engine in this process gave.

llm = LLM(POLICY, logits_processors=[...], additional_config={...}, worker_extension_cls=
          "guided_decode.integrations.vllm.client_values.worker.ValuesOfWorker")
name = secrets.token_hex(16)
asked = {"guide": 1, "guide_values": 1, "guide_values_id": name}
outputs = llm.generate(prompts, SamplingParams(extra_args=asked))
values = take_values(llm, outputs, name)
"""

import logging
from collections.abc import Sequence
from typing import Any

from guided_decode.integrations.vllm.client_values.records import (
    Known,
    TokenValues,
    decoded,
    token_values,
)
from guided_decode.integrations.vllm.client_values.store import MOST_MIB
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from guided_decode.integrations.vllm.client_values.worker import METHOD, refuse_unreadable

logger = logging.getLogger("guided_decode")


def take_values(llm: Any, outputs: Sequence[Any], name: str) -> list[list[TokenValues]]:
    """What the worker kept of requests that ended; once, for it is then forgotten there.

    Args:
        llm: vLLM's LLM.
        outputs: what its `generate` or `chat` gave.
        name: their guide_values_id; several requests may share one. Of what waits beyond 64 MiB
            the oldest steps are dropped; then it says how many tokens have nothing.

    Returns:
        For each output, for each of its samples: values and advantages of its token_ids.

    Raises ValueError: the engine was not started with the worker extension, or is one of many.
    """
    refuse_unreadable(llm.llm_engine.vllm_config.parallel_config)
    known = Known()
    for data in llm.collective_rpc(METHOD, args=([name],)):
        known.add(decoded(data).get(name, []))
    absent = count = 0
    shown = []
    for output in outputs:
        prompt, samples = GrowingText(output.prompt_token_ids), []
        for tokens in (sample.token_ids for sample in output.outputs):
            texts = prompt.copy().digests_before(tokens)
            absent, count = absent + known.absent(texts), count + len(texts)
            samples.append(token_values(known, texts, tokens))
        shown.append(samples)
    if absent:
        logger.warning(
            "%d of %d tokens have no values: the worker has nothing of them under this name, of "
            "which it keeps %d MiB at most, the newest, and once; take the values of fewer outputs "
            "at a time, each part under a name of its own",
            absent, count, MOST_MIB,
        )  # fmt: skip
    return shown
