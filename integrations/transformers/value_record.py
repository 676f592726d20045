"""V along the rows of a call, and what each chosen token added: for whoever looks at the output."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from guided_decode.guidance.config import OnError
from guided_decode.guidance.value_trail import ValueTrail, read_values
from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Scorer


@dataclass
class GuidedOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with return_dict_in_generate, and what the scorer said on the way.

    prefix_values: float32 [rows, new tokens], V of the prefix before each token; NaN behind a
    row's end.
    advantages: float32 [rows, new tokens], what each token added: Q(s,a) − V(s), 0 for a terminal
    to which the critic's terminal rule gives none; NaN where the token was not scored.
    abstained_at: int64 [rows], tokens of the response at which the row was ended because its value
    was below `abstain`; -1 where it was not.
    Each is None where it was not asked for.
    """

    prefix_values: Tensor | None = None
    advantages: Tensor | None = None
    abstained_at: Tensor | None = None


class ValueRecord:
    """The steps of one call."""

    def __init__(self) -> None:
        self._steps: list[dict[int, tuple[float, dict[int, float]]]] = []

    def add(
        self,
        scorer: Scorer,
        rows: Sequence[int],
        handles: Sequence[PrefixHandle],
        trails: Sequence[ValueTrail],
        on_error: OnError,
    ) -> None:
        """A step of these rows, after guidance: what it did not read is read now."""
        values = read_values(scorer, handles, trails, on_error)
        self._steps.append({
            row: (value, trail.advantages)
            for row, value, trail in zip(rows, values, trails, strict=True)
        })  # fmt: skip

    def note(self, rows: Sequence[int], trails: Sequence[ValueTrail]) -> None:
        """A step of rows whose values are kept elsewhere: their advantages alone."""
        self._steps.append({
            row: (torch.nan, trail.advantages) for row, trail in zip(rows, trails, strict=True)
        })  # fmt: skip

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """prefix_values and advantages of the tokens that were chosen, int64 [rows, new tokens]."""
        values = torch.full(tokens.shape, torch.nan, dtype=torch.float32)
        advantages = values.clone()
        chosen = tokens.tolist()
        for t, step in enumerate(self._steps[: tokens.shape[1]]):
            for row, (value, by_token) in step.items():
                values[row, t] = value
                advantages[row, t] = by_token.get(chosen[row][t], torch.nan)
        return values.to(tokens.device), advantages.to(tokens.device)
