"""Guidance under vLLM's speculative decoding, in real engines on Model Runner V2."""

from __future__ import annotations

import itertools
import secrets

import pytest

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import saving_requests, vllm_parts
from tests.integrations.vllm.mixed_requests import CONFIGS
from tests.integrations.vllm.test_runner_v2 import HERE, is_chosen, run, starts_it
from tests.integrations.vllm.trunk_heads import BLOCK, PolicyWithHead, tap_config
from tests.integrations.vllm.vllm_parts import params

from guided_decode.integrations.vllm import take_values  # isort: skip
from guided_decode.integrations.vllm.client_values.worker import EXTENSION  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DRAFTS = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}  # fmt: skip
NEW = 24
PROMPTS = models.prompts([3, 9, 17, 30, 12, 5, 40, 8], seed=3)
ASKED = [
    None,
    CONFIGS[0],
    CONFIGS[1],
    CONFIGS[2],
    None,
    CONFIGS[3],
    CONFIGS[4],
    GuidanceConfig(beta=0.3, top_k=4, value_gate=0.0),
]
# Some have few tokens to choose from, and soon repeat themselves, so that drafts are accepted; one
# of them is penalised for it, behind drafts by these, too.
FEW = [10, 11, 12, 13, 14]
SHOWS = {"worker_extension_cls": EXTENSION}


def sampling(**keys):
    """Of each request; keys: what all ask for besides."""
    return [
        params(
            NEW,
            {**({} if config is None else vllm_parts.asked(config)), **keys} or None,
            ignore_eos=True,
            allowed_token_ids=FEW if i % 2 else None,
            repetition_penalty=1.2 if i == 5 else 1.0,
            presence_penalty=0.2 if i == 5 else 0.0,
        )
        for i, config in enumerate(ASKED)
    ]


SAMPLING = sampling()


def shown(llm):
    """The tokens of each request, and what its client is shown of them."""
    name = secrets.token_hex(16)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    asked = sampling(guide_values=1, guide_values_id=name)
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    values = [samples[0] for samples in take_values(llm, outputs, name)]
    return [list(output.outputs[0].token_ids) for output in outputs], values


def assert_shown(llm, expected):
    """Token for token the same V and advantages, or none, as without speculation."""
    (tokens, values), (wanted_tokens, wanted) = shown(llm), expected
    assert tokens == wanted_tokens
    for own, other in itertools.chain.from_iterable(map(zip, values, wanted)):
        assert [each is None for each in own] == [each is None for each in other]
        assert [each or 0.0 for each in own] == pytest.approx([e or 0.0 for e in other], abs=1e-4)
    assert not any(None in each.prefix_values for each in values)
    scored = [config is not None and config.needs_scores for config in ASKED]
    assert [any(each.advantages) for each in values] == scored


@pytest.fixture(scope="module")
def answers():
    """What the same engine answers that does not speculate, and what it shows."""
    with vllm_parts.engine(vllm_parts.scorer_config(), **SHOWS) as llm:
        return vllm_parts.generate(llm, PROMPTS, SAMPLING), shown(llm)


@pytest.fixture(scope="module")
def without(answers):
    return answers[0]


@pytest.fixture(scope="module")
def speculating(answers):
    # In this process there is one engine at a time.
    with vllm_parts.engine(vllm_parts.scorer_config(), speculative_config=NGRAM, **SHOWS) as llm:
        yield llm


def spent(before, after):
    return {name: after[name] - before[name] for name in after}


@is_chosen
@pytest.mark.parametrize("own", ["async", "tight", "in parts"])
def test_in_other_engines(answers, without, own, monkeypatch):
    """Drafts that are not known to be rejected yet; prompts in pieces, preemption, evictions; more
    logits than vLLM verifies at once."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    if own == "in parts":
        monkeypatch.setattr(rejection_sampler, "MAX_CHUNK_BYTES", 9 * models.VOCAB * 4)
    more = {"speculative_config": {**NGRAM, "method": "ngram_gpu"}, **SHOWS}
    config = vllm_parts.scorer_config()
    if own == "tight":
        more |= {"max_num_batched_tokens": 24, "enable_chunked_prefill": True, "block_size": 32,
                 "num_gpu_blocks_override": 7, "max_model_len": 128,
                 "disable_log_stats": False, "max_num_seqs": 6}  # fmt: skip
        config = vllm_parts.scorer_config(cache_tokens=40 + NEW + 16 + DRAFTS)
    with vllm_parts.engine(config, **more) as llm:
        assert vllm_parts.generate(llm, PROMPTS, SAMPLING) == without
        assert_shown(llm, answers[1])
        report = vllm_parts.worker_report(llm)
        if own == "tight":
            preempted = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
            assert preempted > 0
            assert report["evictions"] > 0
    assert report["pinned"] == report["live"] == report["passthroughs"] == 0
    assert report["steps"] < report["tokens"]


@is_chosen
def test_a_mixed_batch_is_that_of_an_engine_without_speculation(speculating, without):
    before = vllm_parts.worker_report(speculating)
    assert vllm_parts.generate(speculating, PROMPTS, SAMPLING) == without
    counts = spent(before, vllm_parts.worker_report(speculating))
    print("forwards a token:", counts["steps"] / counts["tokens"])
    assert counts["steps"] < 0.85 * counts["tokens"]
    assert counts["draft_rows"] > 0
    assert counts["passthroughs"] == counts["unguided_rows"] == counts["wasted_rows"] == 0
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    lm = oracle.LogProbs(vllm_parts.policy())
    free = [i for i in (2, 6) if ASKED[i] is not None]
    wanted = [brute.greedy(lm, PROMPTS[i], ASKED[i], [], NEW) for i in free]
    oracle.assert_greedy_equal([without[i] for i in free], wanted)


@is_chosen
def test_values_are_those_of_an_engine_without_speculation(speculating, answers):
    before = vllm_parts.worker_report(speculating)
    assert_shown(speculating, answers[1])
    counts = spent(before, vllm_parts.worker_report(speculating))
    assert counts["steps"] < 0.85 * counts["tokens"]
    assert counts["passthroughs"] == 0


@is_chosen
def test_rows_end_and_gates_open_where_they_do_without_speculation(speculating):
    saving = saving_requests.made(models.tiny("llama", "token"))
    saving_requests.assert_engine(speculating, saving)


@is_chosen
def test_siblings_are_pruned(speculating):
    assert_siblings(speculating)


def assert_siblings(llm):
    group = {"guide_group": "group-that-drafts", "guide_group_size": 6, "guide_keep": 2,
             "guide_every": 5, "guide_beta": 1.0, "guide_top_k": 6}  # fmt: skip
    asked = params(20, group, n=6, temperature=1.0, seed=3, ignore_eos=True, stop_token_ids=[100],
                   allowed_token_ids=FEW)  # fmt: skip
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], asked, use_tqdm=False)
    assert sum(sample.stop_reason == 100 for sample in output.outputs) == 4


@is_chosen
def test_the_policys_own_trunk_looks_ahead_behind_drafts():
    """Guided, ended and compared by a head on the policy's trunk, as without speculation."""
    with vllm_parts.engine(tap_config(), block_size=BLOCK, **SHOWS) as llm:
        wanted, values = vllm_parts.generate(llm, PROMPTS, SAMPLING), shown(llm)
    more = {"block_size": BLOCK, "speculative_config": NGRAM, **SHOWS}
    with vllm_parts.engine(tap_config(), **more) as llm:
        assert vllm_parts.generate(llm, PROMPTS, SAMPLING) == wanted
        assert_shown(llm, values)
        report = vllm_parts.worker_report(llm)
        assert report["passthroughs"] == report["clamps"] == report["live"] == 0
        assert report["draft_rows"] > 0
        assert report["steps"] < report["tokens"]
        saving_requests.assert_engine(llm, saving_requests.made(PolicyWithHead()))
        assert_siblings(llm)


@starts_it
@pytest.mark.parametrize(
    "which", ["mixed_batch", "other_engines", "values", "rows_end", "siblings", "trunk"]
)
def test_on_v2(which):
    run(f"{HERE}/test_speculation.py", "-k", which)
