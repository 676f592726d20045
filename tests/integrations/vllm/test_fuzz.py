"""Random schedules through vLLM's own batch classes: every row equals brute force, nothing stays.

V1 is driven through its persistent batch (adds, removals, one-way moves, swaps), Model Runner V2
through its request state (slots that are freed and taken again), both through vLLM's own loaders.
"""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import vllm_parts

import vllm.v1.worker.gpu.buffer_utils as buffer_utils  # isort: skip
from vllm.v1.sample.logits_processor import build_logitsprocs  # isort: skip
from vllm.v1.worker.gpu.sample.logits_processor import (  # isort: skip
    LogitsContext,
    build_custom_logits_processors,
)
from vllm.v1.worker.gpu.states import RequestState  # isort: skip
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch  # isort: skip

# Slow where other work shares the machine.
pytestmark = pytest.mark.timeout(1200)
ROWS, LONGEST, STOP = 6, 48, 99
CPU = torch.device("cpu")
CONFIGS = [
    GuidanceConfig(beta=1.0, top_k=3),
    GuidanceConfig(beta=-2.0, top_k=2, tail="keep"),
    GuidanceConfig(rule="prune", margin=0.5, top_k=4),
    GuidanceConfig(beta=1.5, top_k=4, gate=0.5),
]
# Few tokens and few prompts: sequences come again, so brute force is quick and rows share prefixes.
TOKENS = [10, 11, 12]
PROMPTS = [models.prompts([n], seed=n)[0] for n in (1, 2, 5, 9, 14)]
SCHEDULES = {"v1": 1600, "v2": 500}


@dataclass(eq=False)
class Job:
    """A request of a schedule."""

    name: str
    prompt: list[int]
    config: GuidanceConfig | None
    sampling: Any
    output: list[int] = field(default_factory=list)
    prefilled: int = 0
    was_pruned: bool = False

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output


class Jobs:
    """Draws requests, their logits and what becomes of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.count = 0

    def new(self) -> Job:
        self.count += 1
        config = self.random.choice([*CONFIGS, None])
        extra = {} if config is None else vllm_parts.asked(config)
        if self.random.random() < 0.3:
            extra |= {"guide_group": "group-of-fuzz", "guide_group_size": 4, "guide_keep": 1,
                      "guide_every": 2}  # fmt: skip
        sampling = vllm_parts.params(40, extra or None, stop_token_ids=[STOP])
        return Job(f"{self.count}", self.random.choice(PROMPTS), config, sampling)

    def logits(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, models.VOCAB, generator=self.noise) * 3

    def some(self, jobs: list[Job], chance: float) -> list[Job]:
        return [job for job in jobs if self.random.random() < chance]


@pytest.fixture(scope="module")
def brute():
    return oracle.Oracle(oracle.Values(models.tiny("llama", "token")))


@pytest.fixture(scope="module", params=["roomy", pytest.param("tight", marks=pytest.mark.slow)])
def config(request):
    own = {"cache_tokens": LONGEST + 8} if request.param == "tight" else {}
    return vllm_parts.vllm_config(
        vllm_parts.scorer_config(**own), max_model_len=LONGEST, max_num_seqs=ROWS
    )


def assert_row(job: Job, before: torch.Tensor, after: torch.Tensor, brute) -> None:
    forced = after[STOP] == 0.0 and bool((after == -torch.inf).sum() == len(after) - 1)
    if "guide_group" in (job.sampling.extra_args or {}) and (forced or job.was_pruned):
        assert forced, "a sibling came back to life"
        assert len(job.output) >= 2
        job.was_pruned = True
    elif job.config is None:
        assert torch.equal(before, after)
    else:
        oracle.assert_row_equal(after, brute.row(job.ids, before, job.config, [STOP]))


def assert_nothing_is_left(processor) -> None:
    cache = processor.engine.scorer.cache
    cache.check()
    assert cache.pinned == 0
    assert len(processor.engine.values.groups) == 0
    assert processor.engine.values.members == 0


def run_v1(batch: InputBatch, processor, jobs: Jobs, brute, steps: int) -> int:
    live: list[Job] = []
    waiting: list[Job] = []
    compared = 0
    for _ in range(steps):
        for job in jobs.some(live, 0.2):
            live.remove(job)
            batch.remove_request(job.name)
            if jobs.random.random() < 0.5:
                waiting.append(job)  # preempted
        while len(live) < ROWS and jobs.random.random() < 0.6:
            back = bool(waiting) and jobs.random.random() < 0.5
            job = waiting.pop(0) if back else jobs.new()
            state = CachedRequestState(
                req_id=job.name,
                prompt_token_ids=job.prompt,
                mm_features=[],
                sampling_params=job.sampling,
                generator=None,
                block_ids=([],),
                num_computed_tokens=0,
                output_token_ids=job.output,
            )
            batch.add_request(state)
            live.append(job)
        batch.condense()
        for _ in range(jobs.random.randrange(3)):
            if len(live) >= 2:
                batch.swap_states(*jobs.random.sample(range(len(live)), 2))
        batch.refresh_metadata()
        if not live:
            continue
        by_name = {job.name: job for job in live}
        order = [by_name[name] for name in batch.req_ids]
        before = jobs.logits(len(order))
        after = processor.apply(before.clone())
        for job, own, got in zip(order, before, after, strict=True):
            assert_row(job, own, got, brute)
            compared += 1
        for job in jobs.some(order, 0.8):  # the others are still being prefilled
            if len(job.ids) < LONGEST - 1:
                job.output.append(jobs.random.choice(TOKENS))
    for job in live:
        batch.remove_request(job.name)
    batch.condense()
    batch.refresh_metadata()
    assert not processor.live
    return compared


def test_v1_batch_updates(config, brute):
    flags = tuple(config.model_config.logits_processors)
    processors = build_logitsprocs(config, CPU, False, False, flags)
    batch = InputBatch(
        max_num_reqs=ROWS,
        max_model_len=LONGEST,
        max_num_batched_tokens=256,
        device=CPU,
        vocab_size=models.VOCAB,
        block_sizes=[16],
        max_num_blocks_per_req=[LONGEST // 16],
        logitsprocs=processors,
        logitsprocs_need_output_token_ids=True,
    )
    (own,) = [p for p in processors.non_argmax_invariant if hasattr(p, "engine")]
    compared = 0
    for seed in range(SCHEDULES["v1"] // 2):
        compared += run_v1(batch, own, Jobs(seed), brute, steps=5)
        assert_nothing_is_left(own)
    assert compared > SCHEDULES["v1"] * 2
    assert own.engine.counts.pruned_siblings > 10
    assert own.engine.counts.wasted_rows > 100
    assert own.engine.scorer.stats.passthroughs == 0


class SlotRunner:
    """What Model Runner V2 does with its request state; the writes that it makes with Triton are
    made here."""

    def __init__(self, processor, states: RequestState) -> None:
        self.processor, self.states = processor, states
        self.jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        self.states.add_request(job.name, len(job.prompt), job.ids, 0, 40)
        slot = self.states.req_id_to_index[job.name]
        self.states.all_token_ids.gpu[slot] = 7  # what the last occupant left
        self.states.all_token_ids.gpu[slot, : len(job.ids)] = torch.tensor(job.ids).int()
        self.processor.add_request(slot, job.sampling)
        self.jobs[job.name], job.prefilled = job, 0

    def remove(self, job: Job) -> None:
        self.states.remove_request(job.name)
        del self.jobs[job.name]

    def slot(self, job: Job) -> int:
        return self.states.req_id_to_index[job.name]

    def sample(self, job: Job, token: int) -> None:
        job.output.append(token)
        self.states.all_token_ids.gpu[self.slot(job), len(job.ids) - 1] = token

    def apply(self, order: list[Job], logits: torch.Tensor) -> torch.Tensor:
        slots = np.array([self.slot(job) for job in order], np.int32)
        lengths = np.array([job.prefilled for job in order], np.int32)
        rows = torch.arange(len(order))
        context = LogitsContext(
            expanded_idx_mapping=torch.from_numpy(slots),
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            expanded_local_pos=torch.zeros_like(rows),
            input_ids=torch.tensor([job.ids[job.prefilled - 1] for job in order]).int(),
            pos=torch.from_numpy(lengths - 1),
            # Padded, as a full CUDA graph has it.
            seq_lens_upper_bound_np=np.append(lengths, np.zeros(len(order) % 3, np.int32)),
        )
        self.processor.apply_staged_writes()
        return self.processor.apply(logits, context)


def run_v2(runner: SlotRunner, jobs: Jobs, brute, steps: int) -> int:
    waiting: list[Job] = []
    compared = 0
    for _ in range(steps):
        for job in jobs.some(list(runner.jobs.values()), 0.2):
            runner.remove(job)
            if jobs.random.random() < 0.5:
                waiting.append(job)
        while len(runner.jobs) < ROWS and jobs.random.random() < 0.6:
            back = bool(waiting) and jobs.random.random() < 0.5
            runner.add(waiting.pop(0) if back else jobs.new())
        # Some wait for the token budget; prompts are prefilled in chunks.
        order = jobs.some(list(runner.jobs.values()), 0.9)
        jobs.random.shuffle(order)
        if not order:
            continue
        for job in order:
            left = len(job.ids) - job.prefilled
            job.prefilled += jobs.random.choice([left, min(left, 3)])
        before = jobs.logits(len(order))
        after = runner.apply(order, before.clone())
        for job, own, got in zip(order, before, after, strict=True):
            if job.prefilled < len(job.ids):
                assert torch.equal(own, got), "a row that is still being prefilled changed"
                continue
            assert_row(job, own, got, brute)
            compared += 1
            if len(job.ids) < LONGEST - 1:
                runner.sample(job, jobs.random.choice(TOKENS))
    for job in list(runner.jobs.values()):
        runner.remove(job)
    return compared


def test_v2_slots(config, brute, monkeypatch):
    # Pinned memory needs a GPU; vLLM's own fallback does not.
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    states = RequestState(ROWS, LONGEST, 256, 0, models.VOCAB, CPU)
    flags = config.model_config.logits_processors
    (processor,) = build_custom_logits_processors(config, states, False, flags)
    compared = 0
    for seed in range(SCHEDULES["v2"] // 2):
        compared += run_v2(SlotRunner(processor, states), Jobs(10_000 + seed), brute, steps=6)
    assert compared > SCHEDULES["v2"] * 2
    assert processor.engine.counts.pruned_siblings > 5
    assert processor.engine.counts.wasted_rows == 0
    assert processor.engine.scorer.stats.passthroughs == 0
    # This runner does not say that a request ended: its slot is forgotten some steps later.
    handles = [weakref.ref(row.handle) for row in processor.live if len(row.handle)]
    assert handles
    for _ in range(20):
        processor.apply_staged_writes()
    gc.collect()
    assert not processor.live
    assert not any(handle() is not None for handle in handles)
    assert_nothing_is_left(processor)
