"""A real vLLM engine that preempts and prefills in chunks, beside a scorer that always evicts."""

import pytest

from tests.integrations.vllm import v2_on_cpu, vllm_parts
from tests.integrations.vllm.mixed_requests import LENGTHS, NEW, PROMPTS, SAMPLING, assert_answers

# Engines take their time to load where other work shares the machine.
pytestmark = pytest.mark.timeout(900)
# The longest row, its candidates, and next to nothing: every step evicts, and scores in parts.
TIGHT = max(LENGTHS) + NEW + 16


def test_preemption_chunked_prefill_no_async_and_a_tight_scorer_cache(brute_force, plain_tokens):
    config = vllm_parts.scorer_config(cache_tokens=TIGHT, max_forward_tokens=100)
    with vllm_parts.engine(
        config,
        async_scheduling=False,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        num_gpu_blocks_override=20,
        disable_log_stats=False,
        max_model_len=320,
        block_size=32,
    ) as llm:
        tokens = vllm_parts.generate(llm, PROMPTS, SAMPLING)
        report = vllm_parts.worker_report(llm)
        preempted = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    assert_answers(tokens, brute_force, plain_tokens)
    assert preempted > 0
    assert report["evictions"] > 0
    # V1 hands over prompts that are prefilled in part, whose sample it then drops.
    assert (report["wasted_rows"] > 0) is not v2_on_cpu.IS_CHOSEN
    assert report["pinned"] == report["live"] == 0
