"""Values that clients of an engine are shown, against Hugging Face's and against brute force."""

from __future__ import annotations

import itertools
import math
import secrets

import pytest
import torch

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.mixed_requests import CONFIGS, PROMPTS
from tests.integrations.vllm.vllm_parts import params

from guided_decode.integrations.vllm import take_values  # isort: skip

NEW = 12
# One without guidance, and one whose gate lets steps pass.
ASKED = [None, CONFIGS[0], CONFIGS[4], CONFIGS[3]]


def _keys(config, name):
    own = {} if config is None else vllm_parts.asked(config)
    return {**own, "guide_values": 1, "guide_values_id": name}


def same(found, expected):
    """Whether numbers are there where they should be, and are these."""
    numbers = [math.nan if each is None else each for each in found]
    return numbers == pytest.approx(expected, abs=2e-5, nan_ok=True)


def assert_those_of_generate(llm, scorer):
    """Of greedy requests, beside others that asked for nothing.

    scorer: what guides Hugging Face's generate.
    """
    from guided_decode.integrations.transformers import GuidedDecoding

    name = secrets.token_hex(16)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[: 2 * len(ASKED)]]
    silent = [None if config is None else vllm_parts.asked(config) for config in ASKED]
    sampling = [params(NEW, keys) for keys in silent]
    sampling += [params(NEW, _keys(config, name)) for config in ASKED]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)[len(ASKED) :]
    shown = take_values(llm, outputs, name)
    for output, config, ((values, advantages),) in zip(outputs, ASKED, shown, strict=True):
        guided = GuidedDecoding(
            scorer, config or GuidanceConfig(beta=0.0, tail="keep"), values=True
        )
        out = vllm_parts.policy().generate(
            torch.tensor([output.prompt_token_ids]), custom_generate=guided, do_sample=False,
            max_new_tokens=NEW, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = list(output.outputs[0].token_ids)
        assert tokens == out.sequences[0, len(output.prompt_token_ids) :].tolist()
        assert same(values, out.prefix_values[0].tolist())
        assert same(advantages, out.advantages[0].tolist())
    assert not math.isnan(sum(value for ((values, _),) in shown for value in values))
    assert any(each is not None for ((_, advantages),) in shown for each in advantages)
    # What was taken is not kept.
    assert take_values(llm, outputs[:1], name)[0][0].prefix_values[0] is None


def assert_those_of_brute_force(llm, critic):
    """Of samples of one prompt, which differ after some tokens.

    critic: of class and head as `oracle.Values` reads them.
    """
    prompt, config, name = PROMPTS[1], CONFIGS[0], secrets.token_hex(16)
    sampling = params(NEW, _keys(config, name), n=3, temperature=1.0, seed=7, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    brute = oracle.Values(critic)
    samples = [list(each.token_ids) for each in output.outputs]
    assert len(set(map(tuple, samples))) == 3
    (shown,) = take_values(llm, [output], name)
    for tokens, (values, advantages) in zip(samples, shown, strict=True):
        along = [brute([[*prompt, *tokens[:t]]])[0] for t in range(NEW + 1)]
        assert same(values, along[:-1])
        assert same(advantages, [after - v for v, after in itertools.pairwise(along)])
        assert models.EOS not in tokens
