"""Guidance by a head on the policy's own trunk, in real engines: equal to brute force."""

from __future__ import annotations

import random

import pytest

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import saving_requests, shown_values, vllm_parts
from tests.integrations.vllm.first_tokens import assert_guided_distribution
from tests.integrations.vllm.mixed_requests import CONFIGS, PROMPTS, SAMPLING, assert_answers
from tests.integrations.vllm.trunk_heads import BLOCK, PolicyWithHead, tap_config
from tests.integrations.vllm.vllm_parts import params

from guided_decode.integrations.vllm.client_values.worker import EXTENSION  # isort: skip

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def roomy(plain_tokens):
    # Wide enough to prefill whole prompts: on a CPU vLLM cannot resume a seeded one.
    wide = {"async_scheduling": True, "max_num_batched_tokens": 20_000, "block_size": BLOCK,
            "worker_extension_cls": EXTENSION}  # fmt: skip
    with vllm_parts.engine(tap_config(), **wide) as llm:
        yield llm


def test_a_mixed_batch(roomy, trunk_brute_force, plain_tokens):
    tokens = vllm_parts.generate(roomy, PROMPTS, SAMPLING)
    assert_answers(tokens, trunk_brute_force, plain_tokens)
    report = vllm_parts.worker_report(roomy)
    assert report["live"] == report["groups"] == 0
    assert report["passthroughs"] == report["unguided_rows"] == report["clamps"] == 0
    assert report["rows_gated"] > 0
    changed = sum(a != b for a, b in zip(tokens, plain_tokens, strict=True))
    assert changed >= 15, "the guided requests took the policy's own tokens"


@pytest.mark.slow
def test_a_mixed_batch_again_from_the_prefix_cache(roomy, trunk_brute_force, plain_tokens):
    for _ in range(2):
        assert_answers(
            vllm_parts.generate(roomy, PROMPTS, SAMPLING), trunk_brute_force, plain_tokens
        )


@pytest.mark.slow
def test_rows_end_and_gates_open_by_the_policys_own_values(roomy):
    saving_requests.assert_engine(roomy, saving_requests.made(PolicyWithHead()))


@pytest.mark.slow
def test_who_asked_is_shown_the_policys_own_values(roomy):
    shown_values.assert_those_of_brute_force(roomy, PolicyWithHead())


@pytest.mark.slow
def test_a_guided_token_costs_one_forward(roomy):
    config, length = GuidanceConfig(beta=2.0, top_k=8), 20
    before = vllm_parts.worker_report(roomy)
    vllm_parts.generate(
        roomy, PROMPTS[:4], params(length, vllm_parts.asked(config), ignore_eos=True)
    )
    after = vllm_parts.worker_report(roomy)
    # One forward a step, and no more steps than requests that come late make.
    steps = after["forwards"] - before["forwards"]
    assert length <= steps <= length + 3
    # That is the whole cost of a token: the next step's forward is answered by it, but where a
    # request came late and has its prompt forwarded beside the others.
    assert steps - 4 <= after["answered"] - before["answered"] < steps
    # No candidate ends a request of tokens that are no EOS; those that would are not forwarded.
    assert after["candidate_tokens"] - before["candidate_tokens"] == 4 * 8 * length


@pytest.mark.slow
def test_requests_that_come_and_go_at_any_time(roomy):
    """Aborts, and requests that take the places of others: what was held is nobody else's."""
    chance = random.Random(5)
    config = GuidanceConfig(beta=2.0, top_k=5)
    # Few prompts, so that requests have the same tokens at the same positions.
    prompts = models.prompts([6, 6, 31, 64], seed=8)
    brute = oracle.Oracle(oracle.Values(PolicyWithHead()))
    lm = oracle.LogProbs(vllm_parts.policy())
    wanted = [brute.greedy(lm, prompt, config, [], 12) for prompt in prompts]
    asked = params(12, vllm_parts.asked(config), ignore_eos=True)
    llm, left, live, done = roomy.llm_engine, 150, {}, []
    while left or live:
        while left and len(live) < 5 and chance.random() < 0.6:
            left -= 1
            which = chance.randrange(len(prompts))
            live[f"r{left}"] = which
            llm.add_request(f"r{left}", {"prompt_token_ids": prompts[which]}, asked)
        # An engine that has nothing to do would wait for something.
        for output in llm.step() if llm.has_unfinished_requests() else ():
            if output.finished:
                done.append((live.pop(output.request_id), list(output.outputs[0].token_ids)))
        if live and chance.random() < 0.08:
            name = chance.choice(sorted(live))
            live.pop(name)
            llm.abort_request([name])
    assert 50 < len(done) < 150
    oracle.assert_greedy_equal([tokens for _, tokens in done], [wanted[i] for i, _ in done])
    report = vllm_parts.worker_report(roomy)
    assert report["live"] == report["passthroughs"] == 0
    assert report["answered"] > 20


@pytest.mark.slow
def test_the_first_token_at_temperature_1_has_the_guided_distribution(roomy):
    assert_guided_distribution(roomy, PolicyWithHead(), PROMPTS[1], CONFIGS[0])


@pytest.mark.slow
def test_siblings_are_guided_and_pruned_by_the_same_head(roomy):
    group = {"guide_group": "group-of-the-trunk", "guide_group_size": 6, "guide_keep": 2,
             "guide_every": 5, "guide_beta": 1.0, "guide_top_k": 6}  # fmt: skip
    asked = params(20, group, n=6, temperature=1.0, seed=3, ignore_eos=True, stop_token_ids=[100],
                   logit_bias={100: -100.0})  # fmt: skip
    (output,) = roomy.generate([{"prompt_token_ids": PROMPTS[0]}], asked, use_tqdm=False)
    assert sum(sample.stop_reason == 100 for sample in output.outputs) == 4
