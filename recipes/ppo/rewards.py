"""Scores of finished responses: any callable of this shape, or a reward model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.ppo.rollout import pad_left

# (prompts, responses), both as token ids without padding -> float32 [rows]
RewardFunction = Callable[[Sequence[list[int]], Sequence[list[int]]], Tensor]


class RewardModel:
    """The score of a `*ForSequenceClassification` with one label, read at the last token.

    `bos_id` is put in front where the reward model was trained with BOS and the policy's prompts
    have none (EasyLM's reward models).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        bos_id: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has 1 label, this one has {model.config.num_labels}.")
        self.model, self.pad_id, self.bos_id, self.batch_size = model, pad_id, bos_id, batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        lead = [] if self.bos_id is None else [self.bos_id]
        texts = [lead + p + r for p, r in zip(prompts, responses, strict=True)]
        starts = range(0, len(texts), self.batch_size)
        return torch.cat([self._scores(texts[at : at + self.batch_size]) for at in starts])

    def _scores(self, texts: Sequence[list[int]]) -> Tensor:
        """float32 [rows]; with padding on the left the last token is the last column."""
        tokens, mask = (part.to(self.model.device) for part in pad_left(texts, self.pad_id))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.model.get_submodule("score")(hidden[:, -1])[:, 0].float()
