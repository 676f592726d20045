"""Single-token methods, plain and guided, on a block of prompts: responses, divergence, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guided_decode.lab.ablate.asked import CountedScorer, Counts
from guided_decode.lab.ablate.divergence import Measured, Processor
from guided_decode.lab.calibration.sampling import left_padded
from guided_decode.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Decoded:
    """A response: token ids with the end among them; kl, log_prob: in nats, summed over it.

    scorer_tokens, reference_tokens: distinct ones that the scorer, and the reference of a KL term,
    read for it, its prompt among them: as searches count.
    """

    tokens: list[int]
    kl: float
    log_prob: float
    scorer_tokens: int
    reference_tokens: int


def decode_block(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    generation: Any,
    ends: Sequence[int],
    *,
    seed: int,
    scorer: Scorer | None = None,
    processor: Callable[[Scorer, Tensor], Processor] | None = None,
) -> list[Decoded]:
    """Decodes prompts side by side.

    Args:
        policy: a causal LM of transformers.
        prompts: token ids, at least one each.
        generation: its GenerationConfig, which cuts nothing.
        ends: token ids that end a response.
        seed: of all draws of the block.
        scorer: whose tokens are counted. processor: makes what guides, of the scorer as it has to
            be asked and the attention mask.
    """
    ids, mask = left_padded(prompts, generation.pad_token_id, policy.device)
    greedy = not generation.do_sample
    counts, referred = Counts(), Counts()
    guides = None
    if processor is not None:
        assert scorer is not None
        guides = processor(CountedScorer(scorer, counts, referred), mask)
    measured = Measured(guides, 0.0 if greedy else generation.temperature)
    torch.manual_seed(seed)
    output = policy.generate(
        input_ids=ids, attention_mask=mask, generation_config=generation,
        logits_processor=[measured],
    )  # fmt: skip
    rows = output[:, ids.shape[1] :].tolist()
    tokens = [_until(row, ends) for row in rows]
    sums = measured.sums(output[:, -1], [len(each) for each in tokens])
    whole = [[*prompt, *row] for prompt, row in zip(prompts, rows, strict=True)]
    parts = zip(tokens, *sums, counts.of_rows(whole), referred.of_rows(whole), strict=True)
    return [Decoded(*each) for each in parts]


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
