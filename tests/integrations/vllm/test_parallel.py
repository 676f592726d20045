"""Tensor-parallel engines answer as one rank does."""

from __future__ import annotations

import pytest

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import shown_values, vllm_parts

from guided_decode.integrations.vllm.client_values.worker import EXTENSION  # isort: skip

CONFIG = GuidanceConfig(beta=1.5, top_k=6)
PROMPTS = models.prompts([3, 40, 17], seed=41)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    lm = oracle.LogProbs(vllm_parts.policy())
    expected = [brute.greedy(lm, prompt, CONFIG, [models.EOS], 12) for prompt in PROMPTS]
    config = vllm_parts.scorer_config()
    ranks = {"tensor_parallel_size": 2, "max_num_seqs": 4, "worker_extension_cls": EXTENSION}
    with vllm_parts.engine(config, **ranks) as llm:
        reports = [r for r in llm.collective_rpc(vllm_parts.report) if r is not None]
        tokens = vllm_parts.generate(llm, PROMPTS, vllm_parts.params(12, vllm_parts.asked(CONFIG)))
        plain = vllm_parts.generate(llm, PROMPTS, vllm_parts.params(12))
        report = vllm_parts.worker_report(llm)
        shown_values.assert_those_of_brute_force(llm, models.tiny("llama", "token"))
    assert len(reports) == 1, "one rank scores"
    oracle.assert_greedy_equal(tokens, expected)
    assert plain != tokens
    assert report["guided_rows"] >= 12
    assert report["pinned"] == report["live"] == 0
