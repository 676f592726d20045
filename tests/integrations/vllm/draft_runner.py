"""What Model Runner V2 does with its request state while it verifies drafts.

The writes that vLLM makes with Triton are made here; its data classes and its loader are its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_decode import GuidanceConfig
from tests.integrations.vllm import vllm_parts

from guided_decode.integrations.vllm.client_values.worker import EXTENSION  # isort: skip
import vllm.v1.worker.gpu.buffer_utils as buffer_utils  # isort: skip
from vllm.v1.worker.gpu.sample.logits_processor import (  # isort: skip
    LogitsContext,
    build_custom_logits_processors,
)
from vllm.v1.worker.gpu.states import RequestState  # isort: skip

CPU = torch.device("cpu")
DRAFTS = 3


@dataclass(eq=False)
class Job:
    """A request: what it asked for, what it wrote, and the drafts of its next step."""

    name: str
    prompt: list[int]
    config: GuidanceConfig | None
    sampling: Any
    output: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    # Tokens that were forwarded, and those that it came with.
    prefilled: int = 0
    filled: int = 0

    @property
    def ids(self) -> list[int]:
        """Its history."""
        return self.prompt + self.output

    @property
    def rows(self) -> int:
        """Of the logits."""
        return 1 + len(self.drafts)


class DraftRunner:
    """Requests in slots, their drafts, and what guidance makes of the rows of a step."""

    def __init__(
        self, monkeypatch, config, rows: int, longest: int, vocab: int, later: Sequence[str] = ()
    ) -> None:
        """later: processors that come after guidance, by name."""
        # Pinned memory needs a GPU; vLLM's own fallback does not.
        monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
        self.states = RequestState(rows, longest, 256, DRAFTS, vocab, CPU)
        flags = list(config.model_config.logits_processors)
        config.model_config.logits_processors = [*flags, *later]
        (self.processor,) = build_custom_logits_processors(config, self.states, False, flags)
        self.jobs: dict[str, Job] = {}
        self.random = random.Random(0)

    def add(self, job: Job) -> None:
        """The request takes a slot, in which another's tokens may still be."""
        self.states.add_request(job.name, len(job.prompt), job.ids, 0, 40)
        # Before its tokens are written, as the runner has it.
        self.processor.add_request(self.slot(job), job.sampling)
        self.states.all_token_ids.gpu[self.slot(job)] = 7
        self._write(job)
        self.jobs[job.name], job.prefilled, job.drafts = job, 0, []
        job.filled = len(job.ids)

    def remove(self, job: Job) -> None:
        """It ended, or was preempted."""
        self.states.remove_request(job.name)
        del self.jobs[job.name]

    def slot(self, job: Job) -> int:
        """Where it is."""
        return self.states.req_id_to_index[job.name]

    def write(self, job: Job, tokens: Sequence[int]) -> None:
        """It accepted or sampled these."""
        job.output += tokens
        self._write(job)

    def _write(self, job: Job) -> None:
        slot = self.slot(job)
        self.states.all_token_ids.gpu[slot, : len(job.ids)] = torch.tensor(job.ids).int()
        self.states.total_len.gpu[slot] = len(job.ids)

    def apply(
        self, order: Sequence[Job], logits: Tensor, *, late: int = 0, in_parts: bool = False
    ) -> Tensor:
        """Guided logits, [rows, vocab]: a request's rows follow one another.

        late: by so much the host's idea of a length is above it, as drafts that are not known to
        be rejected yet make it. in_parts: the step is verified in several, as one is whose logits
        are more than a GiB.
        """
        self.processor.apply_staged_writes()
        guided, at, start = [], 0, 0
        while start < len(order):
            most = len(order) - start
            part = order[start : start + (self.random.randint(1, most) if in_parts else most)]
            own = logits[at : at + sum(job.rows for job in part)]
            # vLLM skips what nobody asked anything of.
            asks = any(job.sampling.extra_args is not None for job in part)
            guided.append(self._part(part, own.clone(), late) if asks else own)
            start, at = start + len(part), at + len(own)
        return torch.cat(guided)

    def _part(self, order: Sequence[Job], logits: Tensor, late: int) -> Tensor:
        slots = np.array([self.slot(job) for job in order], np.intp)
        ids, positions = [], []
        for job in order:
            ids += [job.ids[job.prefilled - 1], *job.drafts]
            positions += range(job.prefilled - 1, job.prefilled + len(job.drafts))
        rows = [job.rows for job in order]
        mapping = torch.from_numpy(slots)
        whole = [job.prefilled > job.filled for job in order]
        bounds = [
            job.prefilled + len(job.drafts) + late * is_late
            for job, is_late in zip(order, whole, strict=True)
        ]
        context = LogitsContext(
            expanded_idx_mapping=mapping.repeat_interleave(torch.tensor(rows)),
            idx_mapping=mapping,
            idx_mapping_np=slots,
            expanded_local_pos=torch.tensor([i for n in rows for i in range(n)]).int(),
            input_ids=torch.tensor(ids).int(),
            pos=torch.tensor(positions),
            # A step that runs as a full CUDA graph has it padded to the graph's requests.
            seq_lens_upper_bound_np=np.array(bounds + [0] * self.random.randint(0, 2), np.int32),
        )
        return self.processor.apply(logits, context)


def config(**own: Any):
    """An engine's configuration with drafts of three tokens."""
    from types import SimpleNamespace

    made = vllm_parts.vllm_config(
        vllm_parts.scorer_config(**own),
        max_model_len=64,
        max_num_seqs=6,
        worker_extension_cls=EXTENSION,
    )
    # vLLM would have made the same of --speculative-config, and then asked for Triton.
    made.speculative_config = SimpleNamespace(
        num_speculative_tokens=DRAFTS, method="ngram", rejection_sample_method="standard"
    )
    return made
