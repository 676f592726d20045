"""Single-token methods, plain and guided, on a block of prompts: responses, divergence, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from guided_decode.lab.ablate.asked import CountedScorer, Counts
from guided_decode.lab.ablate.divergence import Measured, Processor
from guided_decode.lab.calibration.sampling import left_padded
from guided_decode.scorer import Scorer


class Abstention(Protocol):
    """A stopping criterion of `generate` that ends rows by their value."""

    @property
    def ended_at(self) -> Tensor:
        """Tokens that each row's response had then, int64 [rows]; −1 where it was not."""
        ...

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are ended, bool [rows]."""
        ...


@dataclass(frozen=True, slots=True)
class Guides:
    """What guides a block; abstention: None ends nobody."""

    processor: Processor
    abstention: Abstention | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A response: token ids with the end among them; kl, log_prob: in nats, summed over it.

    abstained: it was ended because its value was low.

    scorer_tokens, reference_tokens: distinct ones that the scorer, and the reference of a KL term,
    read for it, its prompt among them: as searches count.
    """

    tokens: list[int]
    kl: float
    log_prob: float
    scorer_tokens: int
    reference_tokens: int
    abstained: bool


def decode_block(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    generation: Any,
    ends: Sequence[int],
    *,
    seed: int,
    scorer: Scorer | None = None,
    guidance: Callable[[Scorer, Tensor], Guides] | None = None,
) -> list[Decoded]:
    """Decodes prompts side by side.

    Args:
        policy: a causal LM of transformers.
        prompts: token ids, at least one each.
        generation: its GenerationConfig, which cuts nothing.
        ends: token ids that end a response.
        seed: of all draws of the block.
        scorer: whose tokens are counted. guidance: makes what guides, of the scorer as it has to
            be asked and the attention mask.
    """
    ids, mask = left_padded(prompts, generation.pad_token_id, policy.device)
    greedy = not generation.do_sample
    counts, referred = Counts(), Counts()
    guides = None
    if guidance is not None:
        assert scorer is not None
        guides = guidance(CountedScorer(scorer, counts, referred), mask)
    abstention = None if guides is None else guides.abstention
    measured = Measured(
        None if guides is None else guides.processor, 0.0 if greedy else generation.temperature
    )
    torch.manual_seed(seed)
    output = policy.generate(
        input_ids=ids, attention_mask=mask, generation_config=generation,
        logits_processor=[measured], stopping_criteria=[] if abstention is None else [abstention],
    )  # fmt: skip
    rows = output[:, ids.shape[1] :].tolist()
    stopped = [-1] * len(rows) if abstention is None else abstention.ended_at.tolist()
    # What follows on an end is padding.
    tokens = [_until(row, ends) if n < 0 else row[:n] for row, n in zip(rows, stopped, strict=True)]
    sums = measured.sums(output[:, -1], [len(each) for each in tokens])
    whole = [[*prompt, *row] for prompt, row in zip(prompts, rows, strict=True)]
    abstained = [n >= 0 for n in stopped]
    parts = zip(
        tokens, *sums, counts.of_rows(whole), referred.of_rows(whole), abstained, strict=True
    )
    return [Decoded(*each) for each in parts]


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
