"""The law of what is sampled behind drafts: guided logits, verified by vLLM's own kernels."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from guided_decode import GuidanceConfig
from tests import models
from tests.integrations.vllm.draft_runner import DRAFTS, DraftRunner, config
from tests.integrations.vllm.test_drafts import BRUTE, LONGEST, PROMPTS, TOKENS, guided_job
from tests.integrations.vllm.test_runner_v2 import HERE, is_chosen, run, starts_it

pytestmark = pytest.mark.slow

# vLLM's kernels run in an interpreter, 10 ms a row: few draws of few tokens.
DRAWS, LENGTH, ROWS = 200, 2, 3
ASKED = GuidanceConfig(beta=0.3, top_k=3)
PROMPT = [*PROMPTS[3], 13]


def policy(written):
    """The logits behind these tokens, [vocab]: four are allowed."""
    noise = torch.Generator().manual_seed(int.from_bytes(bytes(written), "big"))
    logits = torch.full((models.VOCAB,), -torch.inf)
    logits[TOKENS] = 0.5 * torch.randn(len(TOKENS), generator=noise)
    return logits


def guided_law():
    """The probability of each response."""
    law = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for written, p in law.items():
            row = BRUTE.row([*PROMPT, *written], policy(written), ASKED)
            each = torch.tensor(row.logits).double().softmax(-1)
            longer |= {(*written, token): p * float(each[token]) for token in TOKENS}
        law = longer
    return law


def verified(jobs, guided, in_blocks):
    """What vLLM's rejection sampler writes of each job, by one draw."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    offsets = torch.arange(ROWS).repeat(len(jobs))
    numbers = torch.tensor([int(job.name) for job in jobs])
    tokens, counts = rejection_sample(
        guided,
        None,
        torch.tensor([[job.ids[-1], *job.drafts] for job in jobs]).flatten(),
        torch.arange(len(jobs) + 1, dtype=torch.int32) * ROWS,
        torch.tensor([len(job.ids) - 1 for job in jobs]).repeat_interleave(ROWS) + offsets,
        numbers,
        numbers.repeat_interleave(ROWS),
        offsets,
        torch.ones(DRAWS),
        torch.arange(DRAWS),
        DRAFTS,
        use_block_verification=in_blocks,
    )
    return [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]


@is_chosen
@pytest.mark.parametrize("in_blocks", [False, True], ids=["standard", "block"])
def test_sampled_tokens_behind_drafts_have_the_guided_distribution(monkeypatch, in_blocks):
    """Leviathan's rule on guided logits: drafts change which draws are made, not their law."""
    made = config()
    made.scheduler_config.max_num_seqs = DRAWS
    runner = DraftRunner(monkeypatch, made, DRAWS, LONGEST, models.VOCAB)
    jobs = [guided_job(f"{i}", PROMPT[:-1], ASKED) for i in range(DRAWS)]
    for job in jobs:
        runner.add(job)
        runner.write(job, PROMPT[-1:])
    drafting, steps = random.Random(0), 0
    while under_way := [job for job in jobs if len(job.output) <= LENGTH]:
        for job in under_way:
            job.prefilled, job.drafts = len(job.ids), drafting.choices(TOKENS, k=ROWS - 1)
        rows = [
            policy([*job.output[1:], *job.drafts[:row]])
            for job in under_way
            for row in range(job.rows)
        ]
        guided = runner.apply(under_way, torch.stack(rows))
        for job, written in zip(under_way, verified(under_way, guided, in_blocks), strict=True):
            runner.write(job, written)
        steps += len(under_way)
    assert steps < 0.95 * DRAWS * LENGTH, "hardly a draft was accepted"
    found = Counter(tuple(job.output[1 : 1 + LENGTH]) for job in jobs)
    law = guided_law()
    every = list(itertools.product(TOKENS, repeat=LENGTH))
    assert not any(found[each] for each in every if law[each] == 0)
    kept = [each for each in every if law[each] * DRAWS >= 5]
    assert len(kept) >= 5
    observed, expected = ([of[each] for each in kept] for of in (found, law))
    expected = [p * DRAWS for p in expected]
    observed.append(DRAWS - sum(observed))
    expected.append(DRAWS - sum(expected))
    assert chisquare(observed, expected).pvalue > 1e-3


@starts_it
def test_on_v2():
    run(f"{HERE}/test_draft_law.py")
