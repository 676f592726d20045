"""Quantised look-alike critics, and what their stock forward says of growing, forking prefixes."""

from importlib.util import find_spec

import pytest
import torch
import transformers as tf

from guided_decode.checkpoints.quantization import QUANTIZATIONS
from tests import models

# What bitsandbytes' blocks divide.
SIZES = {"hidden_size": 128, "intermediate_size": 256}
# Weights of their own: without a window a Mistral is a Llama.
SEEDS = {"llama": 0, "mistral": 1, "mistral-sliding": 2}


def needs(*modules):
    """Skips a test where a library is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def critic(arch, head="token", **more):
    """The critic in full precision; nobody writes to it."""
    return models.tiny(arch, head, seed=SEEDS[arch], **SIZES, **more)


def folder(arch, head="token", **more):
    """Where it is saved."""
    return models.saved(arch, head, seed=SEEDS[arch], **SIZES, **more)


def by_transformers(path, config, dtype=torch.float32, auto=tf.AutoModelForTokenClassification):
    """A model as transformers quantises it, that computes in its dtype."""
    model = auto.from_pretrained(path, quantization_config=config, dtype=dtype).eval()
    for module in model.modules():
        # Else bitsandbytes computes in bfloat16 on some CPUs.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def config_of(name, dtype=torch.float32):
    """Transformers' config of one of our names, which leaves the head alone."""
    return QUANTIZATIONS[name].config(dtype, ("score",))


def growing_and_forking(seed=0, steps=6):
    """Batches of prefixes and candidates: each grows by a candidate, forks, or is there twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCAB, (60,), generator=generator).tolist()
    prefix = ids[:9]
    for step in range(steps):
        rows = [prefix, [*prefix[:5], *ids[20 : 21 + step]], [*prefix, *ids[40 : 40 + step]]]
        candidates = torch.randint(3, models.VOCAB, (len(rows), 4), generator=generator)
        yield rows, candidates
        prefix = [*prefix, int(candidates[0, step % 4])]


def brute_force(model, rows, candidates):
    """Values and baselines by the stock forward of whole sequences, one by one."""
    trunk, weight = model.base_model, model.score.weight[0].detach().float()

    def value(ids):
        return float(trunk(torch.tensor([ids])).last_hidden_state[0, -1].float() @ weight)

    values = [[value([*row, token]) for token in own.tolist()]
              for row, own in zip(rows, candidates, strict=True)]  # fmt: skip
    return torch.tensor(values), torch.tensor([value(row) for row in rows])


def assert_scored_by(scorer, model, *, rounded=False):
    """A scorer gives what a model's stock forward gives.

    rounded: its layers round activations to 8 bits, where the last digit of a float32 may decide
    between two steps: few values may differ by such a step.
    """
    got, wanted = [], []
    for rows, candidates in growing_and_forking():
        values, baseline = scorer.score(rows, candidates)
        expected, before = brute_force(model, rows, candidates)
        got += [values.flatten(), baseline]
        wanted += [expected.flatten(), before]
    assert_close(torch.cat(got), torch.cat(wanted), rounded=rounded)


def assert_close(got, wanted, *, rounded=False):
    """Within 1e-4; of what is rounded, but for one of twenty, which is within 2% of the range."""
    if not rounded:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        return
    off = (got - wanted).abs()
    assert int((off > 1e-4).sum()) <= max(1, len(off.flatten()) // 20)
    assert float(off.max()) <= 0.02 * float(wanted.max() - wanted.min())
