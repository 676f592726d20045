"""A reward model as the judge of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from guided_decode.tiny_tulu import render
from recipes.ppo.rollout import pad_left

BATCH = 500


class RewardJudge:
    """A reward model's scores of whole answers."""

    def __init__(
        self, model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        end = self.tokenizer.eos_token
        chats = [f"{render(p)}{r}{end}" for p, r in zip(prompts, responses, strict=True)]
        rows = self.tokenizer(chats, add_special_tokens=False).input_ids
        scores: list[Tensor] = []
        for begin in range(0, len(rows), BATCH):
            tokens, mask = pad_left(rows[begin : begin + BATCH], self.tokenizer.pad_token_id)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            hidden = self.model.model(
                input_ids=tokens, attention_mask=mask, position_ids=positions
            ).last_hidden_state[:, -1]
            scores.append(self.model.score(hidden)[:, 0])
        return torch.cat(scores).tolist()
