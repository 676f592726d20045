"""The same in engines that are tight, prefill in chunks, preempt, or have several ranks."""

from __future__ import annotations

import pytest

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import v2_on_cpu, vllm_parts
from tests.integrations.vllm.mixed_requests import PROMPTS, SAMPLING, assert_answers
from tests.integrations.vllm.trunk_heads import BLOCK, PolicyWithHead, tap_config
from tests.integrations.vllm.vllm_parts import params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_contexts_that_end_anywhere_in_a_block():
    """One to as many blocks as there are positions, with every residue of the block's size."""
    lengths = [BLOCK * (i % 14) + i + 1 for i in range(BLOCK)]
    assert {length % BLOCK for length in lengths} == set(range(BLOCK))
    prompts = models.prompts(lengths, seed=77)
    config = GuidanceConfig(beta=2.0, top_k=5)
    brute = oracle.Oracle(oracle.Values(PolicyWithHead()))
    lm = oracle.LogProbs(vllm_parts.policy())
    wanted = [brute.greedy(lm, prompt, config, [], 6) for prompt in prompts]
    with vllm_parts.engine(tap_config(), block_size=BLOCK, max_num_batched_tokens=96) as llm:
        asked = params(6, vllm_parts.asked(config), ignore_eos=True)
        tokens = vllm_parts.generate(llm, prompts, asked)
    oracle.assert_greedy_equal(tokens, wanted)


def test_preemption_chunked_prefill_and_no_async(trunk_brute_force, plain_tokens):
    with vllm_parts.engine(
        tap_config(),
        async_scheduling=False,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        num_gpu_blocks_override=20,
        disable_log_stats=False,
        max_model_len=320,
        block_size=BLOCK,
    ) as llm:
        tokens = vllm_parts.generate(llm, PROMPTS, SAMPLING)
        report = vllm_parts.worker_report(llm)
        preempted = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    assert_answers(tokens, trunk_brute_force, plain_tokens)
    assert preempted > 0
    assert report["live"] == report["passthroughs"] == 0


@pytest.mark.skipif(v2_on_cpu.IS_CHOSEN, reason="Triton's interpreter runs one rank")
def test_two_ranks_look_ahead_in_lockstep(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    config = GuidanceConfig(beta=2.0, top_k=6)
    brute = oracle.Oracle(oracle.Values(PolicyWithHead()))
    lm = oracle.LogProbs(vllm_parts.policy())
    prompts = models.prompts([3, 40, 17], seed=41)
    wanted = [brute.greedy(lm, prompt, config, [models.EOS], 12) for prompt in prompts]
    with vllm_parts.engine(tap_config(), tensor_parallel_size=2, max_num_seqs=4) as llm:
        tokens = vllm_parts.generate(llm, prompts, params(12, vllm_parts.asked(config)))
        plain = vllm_parts.generate(llm, prompts, params(12))
    oracle.assert_greedy_equal(tokens, wanted)
    assert plain != tokens
