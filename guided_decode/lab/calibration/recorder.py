"""What a decoding loop meets on its way: recorded beside the guidance that it is decoded by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guided_decode.guidance.candidates import log_normaliser, select_candidates
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.calibration.states import States

# What `generate` takes as a logits processor.
Processor = Callable[[Tensor, Tensor], Tensor]


class Recorder:
    """A logits processor that hands on what another makes of the logits, or leaves them as they
    are, and keeps each step's candidates with their probabilities and advantages."""

    def __init__(
        self, processor: Processor, config: GuidanceConfig, vocab_size: int, *, guides: bool
    ) -> None:
        """
        Args:
            processor: guides by `config`; nothing else may be before it.
            config: of reweighting, with a beta that is not 0.
            vocab_size: the scorer's: ids beyond it are no candidates.
            guides: whether the next tokens are drawn from the guided logits.
        """
        self._processor, self._config = processor, config
        self._vocab, self._guides = vocab_size, guides
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        guided = self._processor(input_ids, scores)
        config = self._config
        known = scores[:, : self._vocab]
        candidates = select_candidates(known, config.top_k, config.top_p)
        there, at = candidates >= 0, candidates.clamp(min=0)
        plain = known.gather(-1, at).double()
        moved = guided.gather(-1, at).double() - plain
        probability = (plain - log_normaliser(scores).double()).exp().masked_fill(~there, 0.0)
        advantage = (moved / config.beta).masked_fill(~there, 0.0)
        rest = (1.0 - probability.sum(-1)).clamp(min=0.0)
        self._steps.append((probability.cpu(), advantage.cpu(), rest.cpu()))
        return guided if self._guides else scores

    def states(self, lengths: Sequence[int]) -> States:
        """What was met in the first so many tokens of each row: `generate` goes on with finished
        rows."""
        probability, advantage, rest = (
            torch.stack(each, 1) for each in zip(*self._steps, strict=True)
        )
        step = torch.arange(rest.shape[1])
        live = step < torch.tensor(lengths)[:, None]
        rows = torch.arange(len(lengths))[:, None].expand_as(live)
        return States(probability[live], advantage[live], rest[live], rows[live])
