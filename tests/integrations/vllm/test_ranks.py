"""Ranks of a tensor-parallel engine: one scores, and all have its result, or its failure."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests import PATIENCE, models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.vllm_steps import (
    CPU,
    Failing,
    brute_rows,
    built,
    engine,
    rows,
    step_logits,
)

from guided_decode.integrations.vllm.build import build_engine  # isort: skip
from guided_decode.integrations.vllm.engine import GuidedEngine  # isort: skip


@pytest.fixture(scope="module")
def scorer():
    return built().scorer


class Ranks:
    """Two ranks in two threads: what rank 0 broadcasts is what rank 1 gets."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=PATIENCE)
        self.sent: torch.Tensor | None = None

    def lead(self, tensor):
        assert tensor.is_contiguous()
        self.sent = tensor.clone()
        self.barrier.wait()
        self.barrier.wait()
        return tensor

    def follow(self, tensor):
        self.barrier.wait()
        assert tensor.shape == self.sent.shape
        tensor.copy_(self.sent)
        self.barrier.wait()
        return tensor

    def run(self, scorer, every=False, **own):
        """What each rank's step gave: its logits, or its error."""
        results: list[Any] = [None, None]

        def rank(number, engine):
            try:
                # vLLM hands over a slice where it padded the vocabulary.
                padded = torch.nn.functional.pad(step_logits(), (0, 27))
                live = rows(unguided=() if every else [2])
                results[number] = engine.step(padded[:, : models.VOCAB], live)
            except Exception as error:
                results[number] = error

        leader = engine(scorer, self.lead, **own)
        follower = engine(None, self.follow, **own)
        threads = [
            threading.Thread(target=rank, args=args) for args in ((0, leader), (1, follower))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_have_one_result(scorer):
    logits = step_logits()
    first, second = Ranks().run(scorer)
    assert torch.equal(first, second)
    for i, expected in enumerate(brute_rows(logits)):
        if i != 2:
            oracle.assert_row_equal(second[i], expected)
    assert torch.equal(second[2], logits[2])


def test_a_failure_is_decided_once_for_all_ranks(scorer):
    for every in (False, True):
        first, second = Ranks().run(Failing(scorer, "raises"), every)
        assert torch.equal(first, step_logits())
        assert torch.equal(second, step_logits())
    first, second = Ranks().run(Failing(scorer, "raises"), on_error="raise", max_beta=5.0)
    assert "the scorer broke" in str(first)
    assert "the rank that scores failed" in str(second)


def test_ranks_admit_the_same_requests():
    """An implicit reward compares no siblings: the ranks without one must know it, too."""
    implicit = {"scorer": models.saved("llama", "lm"), "kind": "implicit",
                "reference": models.saved("llama", "lm", seed=1), "log_every": 0}  # fmt: skip
    config = vllm_parts.vllm_config({"guided_decode": implicit})
    asks = vllm_parts.params(8, {"guide_group": "a-group-name", "guide_group_size": 2,
                                 "guide_keep": 1, "guide_every": 2},
                             stop_token_ids=[77])  # fmt: skip
    leader = build_engine(config, CPU)
    follower = GuidedEngine(leader.config, None, groups=leader._compares)
    assert leader.admit(asks) is None
    assert follower.admit(asks) is None
