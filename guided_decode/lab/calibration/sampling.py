"""Decoding a set of prompts at temperature 1, guided or plain, for what is met on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.calibration.recorder import Processor, Recorder
from guided_decode.lab.calibration.states import States, joined
from guided_decode.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Decoder:
    """Policy, scorer and settings; everything but beta, prompts and seed.

    policy: a causal LM of transformers. generation: its GenerationConfig, which samples at
    temperature 1 and cuts nothing. processor: makes the logits processor that guides, from a
    config and the batch's attention mask. ends: token ids that end a response. batch: rows that
    are decoded at once.
    """

    policy: Any
    scorer: Scorer
    config: GuidanceConfig
    generation: Any
    processor: Callable[[GuidanceConfig, Tensor], Processor]
    ends: Sequence[int]
    batch: int

    def plain(self, prompts: Sequence[Sequence[int]], seed: int) -> States:
        """What the policy meets by itself."""
        return self._decode(prompts, 1.0, seed, guides=False)

    def guided(self, prompts: Sequence[Sequence[int]], beta: float, seed: int) -> States:
        """What guidance with this beta meets."""
        return self._decode(prompts, beta, seed, guides=True)

    def _decode(
        self, prompts: Sequence[Sequence[int]], beta: float, seed: int, *, guides: bool
    ) -> States:
        torch.manual_seed(seed)
        config = self.config.changed(beta=beta)
        # Prompts of one length pad nothing.
        ordered = sorted(prompts, key=len)
        return joined([
            self._batch(ordered[start : start + self.batch], config, guides=guides)
            for start in range(0, len(ordered), self.batch)
        ])  # fmt: skip

    def _batch(
        self, prompts: Sequence[Sequence[int]], config: GuidanceConfig, *, guides: bool
    ) -> States:
        ids, mask = left_padded(prompts, self.generation.pad_token_id, self.policy.device)
        recorder = Recorder(
            self.processor(config, mask), config, self.scorer.vocab_size, guides=guides
        )
        output = self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self.generation,
            logits_processor=[recorder],
        )
        return recorder.states([self._length(row) for row in output[:, ids.shape[1] :].tolist()])

    def _length(self, response: list[int]) -> int:
        return next((i + 1 for i, each in enumerate(response) if each in self.ends), len(response))


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [rows, width] each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids.to(device), mask.to(device)
