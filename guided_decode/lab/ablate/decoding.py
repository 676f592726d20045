"""Single-token methods, plain and guided, on a block of prompts: responses, divergence, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guided_decode.lab.ablate.divergence import Measured, Processor
from guided_decode.lab.calibration.sampling import left_padded
from guided_decode.scorer import Scorer
from guided_decode.search.budget import TokenTree


@dataclass(frozen=True, slots=True)
class Decoded:
    """A response: token ids with the end among them; kl, log_prob: in nats, summed over it."""

    tokens: list[int]
    kl: float
    log_prob: float


@dataclass(frozen=True, slots=True)
class Block:
    """What came of a block of prompts.

    scorer_tokens: distinct tokens that went through the scorer, by its counter, a prompt's
    beginning that others have in common counted for each: as searches count.
    """

    responses: list[Decoded]
    scorer_tokens: int


def decode_block(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    generation: Any,
    ends: Sequence[int],
    *,
    seed: int,
    scorer: Scorer | None = None,
    processor: Callable[[Tensor], Processor] | None = None,
) -> Block:
    """Decodes prompts side by side.

    Args:
        policy: a causal LM of transformers.
        prompts: token ids, at least one each.
        generation: its GenerationConfig, which cuts nothing.
        ends: token ids that end a response.
        seed: of all draws of the block.
        scorer: whose tokens are counted. processor: makes what guides, of the attention mask.
    """
    ids, mask = left_padded(prompts, generation.pad_token_id, policy.device)
    greedy = not generation.do_sample
    measured = Measured(
        None if processor is None else processor(mask), 0.0 if greedy else generation.temperature
    )
    before = 0 if scorer is None else scorer.stats.tokens
    torch.manual_seed(seed)
    output = policy.generate(
        input_ids=ids, attention_mask=mask, generation_config=generation,
        logits_processor=[measured],
    )  # fmt: skip
    rows = output[:, ids.shape[1] :].tolist()
    tokens = [_until(row, ends) for row in rows]
    sums = measured.sums(output[:, -1], [len(each) for each in tokens])
    counted = 0 if scorer is None else scorer.stats.tokens - before
    return Block(
        [Decoded(own, kl, log_prob) for own, kl, log_prob in zip(tokens, *sums, strict=True)],
        counted + (_alike(prompts) if counted else 0),
    )


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def _alike(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens at the prompts' beginnings that another one has, too."""
    tree = TokenTree()
    for prompt in prompts:
        tree.add(prompt)
    return sum(map(len, prompts)) - len(tree)
