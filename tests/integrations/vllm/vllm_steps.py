"""One step of an engine's guidance without an engine: its rows, its logits, scorers that fail."""

from __future__ import annotations

from typing import Any

import torch

from guided_decode import GuidanceConfig
from guided_decode.scorer import Scores
from tests import models, oracle
from tests.integrations.vllm import vllm_parts

from guided_decode.integrations.vllm.build import build_engine  # isort: skip
from guided_decode.integrations.vllm.engine import GuidedEngine  # isort: skip
from guided_decode.integrations.vllm.request import Request  # isort: skip
from guided_decode.integrations.vllm.rows import LiveRow, Placed  # isort: skip
from guided_decode.integrations.vllm.server_config import parse_config  # isort: skip
from guided_decode.prefix import PrefixHandle  # isort: skip

CPU = torch.device("cpu")
CONFIG = GuidanceConfig(beta=1.0, top_k=4)
PROMPTS = models.prompts([4, 9, 6, 12], seed=2)


class Failing:
    """The tiny critic, which fails on some of its calls."""

    def __init__(self, scorer: Any, fault: str) -> None:
        self._scorer, self._fault = scorer, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, prefixes, candidates):
        if self._fault == "raises":
            raise RuntimeError("the scorer broke")
        values, baseline = self._scorer.score(prefixes, candidates)
        spoiled = torch.tensor([len(prefix) == 9 for prefix in prefixes])
        bad = torch.nan if self._fault == "nan" else torch.inf
        if self._fault == "nan baseline":
            return Scores(values, baseline.masked_fill(spoiled, torch.nan))
        return Scores(values.masked_fill(spoiled[:, None], bad), baseline)


def built(**own):
    return build_engine(vllm_parts.vllm_config(vllm_parts.scorer_config(**own)), CPU)


def engine(scorer, broadcast=None, store=None, **own):
    config = vllm_parts.scorer_config(**own)["guided_decode"]
    return GuidedEngine(parse_config(config, "the test"), scorer, broadcast=broadcast, store=store)


def rows(pruning=None, unguided=()):
    return [
        Placed(i, LiveRow(Request(CONFIG, (models.EOS,), pruning), PrefixHandle(p), len(p)))
        for i, p in enumerate(PROMPTS)
        if i not in unguided
    ]


def step_logits():
    return torch.randn(len(PROMPTS), models.VOCAB, generator=torch.Generator().manual_seed(0))


def brute_rows(logits):
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    return [brute.row(p, own, CONFIG, [models.EOS]) for p, own in zip(PROMPTS, logits, strict=True)]
