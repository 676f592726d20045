"""32 requests of every length: a third unguided, the others by five kinds of settings."""

import random

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.vllm_parts import params

NEW = 32
CONFIGS = [
    GuidanceConfig(beta=1.0, top_k=6),
    GuidanceConfig(beta=2.5, top_k=12, top_p=0.8),
    GuidanceConfig(beta=-1.0, top_k=3, tail="keep"),
    GuidanceConfig(rule="prune", margin=0.5, top_k=8, top_p=0.9),
    GuidanceConfig(beta=1.5, top_k=8, gate=0.4),
]
LENGTHS = random.Random(7).choices(range(1, 200), k=32)
PROMPTS = models.prompts(LENGTHS, seed=31)
# Every third is not guided.
ASKED = [None if i % 3 == 0 else CONFIGS[i % len(CONFIGS)] for i in range(len(PROMPTS))]
SAMPLING = [
    params(NEW, None if config is None else vllm_parts.asked(config), ignore_eos=i % 8 == 7)
    for i, config in enumerate(ASKED)
]


def ends(i: int) -> list[int]:
    return [] if SAMPLING[i].ignore_eos else [models.EOS]


def brute_force_answers(critic=None):
    """Tokens and decision gaps of each request, by full recomputation.

    critic: of class and head as `oracle.Values` reads them; the tiny one of these tests.
    """
    brute = oracle.Oracle(oracle.Values(critic or models.tiny("llama", "token")))
    lm = oracle.LogProbs(vllm_parts.policy())
    unguided = GuidanceConfig(beta=0.0, tail="keep")
    return [
        brute.greedy(lm, prompt, config or unguided, ends(i), NEW)
        for i, (prompt, config) in enumerate(zip(PROMPTS, ASKED, strict=True))
    ]


def plain_answers():
    """What an engine without the processor answers."""
    sampling = [params(NEW, ignore_eos=each.ignore_eos) for each in SAMPLING]
    with vllm_parts.engine(None, async_scheduling=True, max_num_batched_tokens=20_000) as llm:
        return vllm_parts.generate(llm, PROMPTS, sampling)


def assert_answers(tokens, brute_force, plain_tokens):
    guided = [i for i, config in enumerate(ASKED) if config is not None]
    oracle.assert_greedy_equal([tokens[i] for i in guided], [brute_force[i] for i in guided])
    for i, config in enumerate(ASKED):
        if config is None:
            assert tokens[i] == plain_tokens[i], f"unguided request {i} changed"
