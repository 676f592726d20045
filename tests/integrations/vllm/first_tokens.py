"""The first token of many seeded samples against the exact guided distribution."""

import torch
from scipy.stats import chisquare

from tests import models, oracle
from tests.integrations.vllm import v2_on_cpu, vllm_parts

# Triton's interpreter takes its time for each.
DRAWS, AT_ONCE = 2_000 if v2_on_cpu.IS_CHOSEN else 20_000, 200


def assert_guided_distribution(llm, critic, prompt, config):
    """critic: as `oracle.Values` reads it."""
    brute = oracle.Oracle(oracle.Values(critic))
    logits = oracle.LogProbs(vllm_parts.policy()).logits(prompt)
    exact = torch.tensor(brute.row(prompt, logits, config, [models.EOS]).logits).double()
    likely = exact.softmax(-1)
    sampling = vllm_parts.params(1, vllm_parts.asked(config), temperature=1.0, n=AT_ONCE)
    counts = torch.zeros(models.VOCAB)
    for seed in range(0, DRAWS, AT_ONCE):
        # The samples of one request take the seeds that follow.
        sampling.seed = seed
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        for sample in output.outputs:
            counts[sample.token_ids[0]] += 1
    assert counts[likely == 0].sum() == 0
    kept = likely * DRAWS >= 5
    observed = torch.cat([counts[kept], counts[~kept].sum()[None]])
    expected = torch.cat([likely[kept], likely[~kept].sum()[None]]) * DRAWS
    alive = expected > 0
    assert alive.sum() >= 3
    assert chisquare(observed[alive], expected[alive].numpy()).pvalue > 1e-3
