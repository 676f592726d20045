"""What requests ask for, and how many there are, does not decide what is compiled."""

from __future__ import annotations

import random

import pytest
import torch

from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.guidance.step import guide_rows
from tests import models
from tests.forward.test_graphs import scorer_like_a_gpus
from tests.kernels.compiled import Compiled, by_kernel

CONFIGS = [
    GuidanceConfig(top_k=1),
    GuidanceConfig(top_k=3, top_p=0.7),
    GuidanceConfig(top_k=16, tail="mask"),
    GuidanceConfig(top_k=16, gate=0.9),
    GuidanceConfig(top_k=17, top_p=0.9, gate=0.3, baseline="mean"),
    GuidanceConfig(top_k=32, rule="prune", margin=0.5),
    GuidanceConfig(top_k=40, top_p=0.95),
    GuidanceConfig(top_k=64),
]  # fmt: skip


def decode_anything(scorer, *, seed, steps=30):
    """Batches of one to five rows, each row with a config of its own, that come and go."""
    drawn = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    prompts = models.prompts([drawn.randint(1, 60) for _ in range(4)] + [300], seed=seed)
    handles = [PrefixHandle(prompt) for prompt in prompts]
    for _ in range(steps):
        live = drawn.sample(range(5), drawn.randint(1, 5))
        configs = drawn.choices(CONFIGS, k=len(live))
        logits = torch.randn(len(live), models.VOCAB, generator=noise) * 3
        guided = guide_rows(
            scorer, logits, [handles[i] for i in live], configs, terminals=[models.EOS]
        )
        for i, token in zip(live, guided.argmax(-1).tolist(), strict=True):
            handles[i].extend([token] * drawn.randint(1, 3))


@pytest.mark.parametrize("graphs", [True, False], ids=["padded", "as they come"])
def test_mixed_batches_compile_few_kernels_and_always_the_same(graphs, monkeypatch):
    scorer = scorer_like_a_gpus()
    if not graphs:
        scorer._graphs = None
    compiled = Compiled(monkeypatch)
    decode_anything(scorer, seed=0)
    known = compiled.take()
    assert by_kernel(known) == {
        "_tops_kernel": 1,
        # Widths up to 16, 32 and 64.
        "_choose_kernel": 3,
        "_guide_logits_kernel": 3,
        # A prefix in one part, or in several.
        "_attend_kernel": 2,
        "_merge_kernel": 1,
        "_value_head_kernel": 1,
    }
    decode_anything(scorer, seed=1)
    assert compiled.take() <= known
