"""Guided decoding as others do it, in our loop: a cache copied for each candidate, or none."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, StoppingCriteria

from benchmarks.gpu.loop import Guide, Handles
from benchmarks.gpu.models import Models
from guided_decode import GuidanceConfig, guide
from guided_decode.forward.cache_argument import cache_argument
from guided_decode.guidance.rule import select_candidates
from guided_decode.scorer import Scores
from guided_decode.scoring.critic import ValueHead

# New tokens of a stock `generate` call that is timed.
GENERATED = 24


class CopiedCache(Guide):
    """The critic's cache of each row copied for each candidate, as ARGS and RAD do.

    The copy of the chosen candidate is kept for the next step.
    """

    def __init__(
        self, models: Models, prompts: Tensor, config: GuidanceConfig, *, drawn: bool
    ) -> None:
        """prompts: int64 [rows, length]; drawn: keys and values of all but the last token are."""
        self.critic, self.head, self.config = models.critic, models.head, config
        self.cache = DynamicCache(config=models.critic.config)
        if drawn:
            _draw(self.cache, models, prompts[:, :-1])
        else:
            models.critic(prompts[:, :-1], **{cache_argument(models.critic): self.cache})
        self.baseline = self._values(prompts[:, -1:])

    def __call__(self, logits: Tensor, handles: Handles) -> Tensor:
        assert self.config.top_k is not None
        self.candidates = select_candidates(logits, self.config.top_k)
        rows, k = self.candidates.shape
        self.cache.batch_repeat_interleave(k)
        self.values = self._values(self.candidates.view(-1, 1)).view(rows, k)
        return guide(logits, self.candidates, Scores(self.values, self.baseline), self.config)

    def choose(self, logits: Tensor) -> list[int]:
        tokens = logits.argmax(-1)
        rank = (self.candidates == tokens[:, None]).int().argmax(-1)
        rows, k = self.candidates.shape
        kept = torch.arange(rows, device=rank.device) * k + rank
        self.cache.batch_select_indices(kept)
        self.baseline = self.values.gather(-1, rank[:, None])[:, 0]
        return tokens.tolist()

    def _values(self, tokens: Tensor) -> Tensor:
        """V after one more token a row of the cache, float32 [n]."""
        hidden = self.critic(tokens, **{cache_argument(self.critic): self.cache}).last_hidden_state
        return self.head(hidden[:, -1])


def _draw(cache: DynamicCache, models: Models, ids: Tensor) -> None:
    size, (rows, length) = models.size, ids.shape
    for layer in range(size.layers):
        keys, values = (
            torch.randn(
                rows,
                size.kv_heads,
                length,
                size.head_dim,
                device=models.device,
                dtype=models.critic.dtype,
            )
            for _ in range(2)
        )
        cache.update(keys, values, layer)


class Recomputed(Guide):
    """Prefix and candidate forwarded anew for each candidate, one row's candidates at a time."""

    def __init__(self, critic: LlamaModel, head: ValueHead, config: GuidanceConfig) -> None:
        self.critic, self.head, self.config = critic, head, config

    def __call__(self, logits: Tensor, handles: Handles) -> Tensor:
        assert self.config.top_k is not None
        candidates = select_candidates(logits, self.config.top_k)
        scores = [
            self._row(handle.tokens, own) for handle, own in zip(handles, candidates, strict=True)
        ]
        values, baseline = (torch.stack(parts) for parts in zip(*scores, strict=True))
        return guide(logits, candidates, Scores(values, baseline), self.config)

    def _row(self, prefix: "np.typing.NDArray[np.int64]", own: Tensor) -> tuple[Tensor, Tensor]:
        """V after each candidate, [k], and V of the prefix, []."""
        ids = torch.from_numpy(prefix.copy()).to(own.device)
        sequences = torch.cat([ids.expand(len(own), -1), own[:, None]], -1)
        hidden = self.critic(sequences, use_cache=False).last_hidden_state
        values = self.head(hidden[:, -2:].flatten(0, 1)).view(-1, 2)
        return values[:, 1], values[0, 0]


class Clock(StoppingCriteria):
    """Notes when each token of a `generate` call was there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_seconds(policy: LlamaForCausalLM, prompts: Tensor, steps: int) -> Sequence[float]:
    """Seconds of each token of stock `generate`, without its first, which is the prefill's."""
    clock = Clock()
    policy.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=steps + 1,
        do_sample=False,
        stopping_criteria=[clock],
    )
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
