"""Responses sampled from the policy, as padded tensors that know their own geometry."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class Rollout:
    """Prompts padded on the left, responses padded on the right, side by side.

    tokens         int64 [rows, prompt width + response width]
    attention      int64, the same shape: 1 on the tokens of prompt and response
    response_mask  float32 [rows, response width]: 1 on generated tokens, EOS included
    finished       bool [rows]: the response ends with EOS
    """

    tokens: Tensor
    attention: Tensor
    response_mask: Tensor
    finished: Tensor

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """Generated tokens and padding, int64 [rows, response width]."""
        return self.tokens[:, self.prompt_width :]

    @property
    def positions(self) -> Tensor:
        """Position ids that ignore padding, int64, the shape of `tokens`."""
        return (self.attention.cumsum(-1) - 1).clamp(min=0)

    def rows(self, index: Tensor) -> "Rollout":
        """The rows named by `index`, int64 [n]."""
        return Rollout(
            self.tokens[index],
            self.attention[index],
            self.response_mask[index],
            self.finished[index],
        )

    def prompt_ids(self, row: int) -> list[int]:
        """The prompt of one row, unpadded."""
        mask = self.attention[row, : self.prompt_width].bool()
        return self.tokens[row, : self.prompt_width][mask].tolist()

    def response_ids(self, row: int) -> list[int]:
        """The response of one row, unpadded; it ends with EOS where the row finished."""
        return self.responses[row, self.response_mask[row].bool()].tolist()


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both int64 [rows, longest prompt], padded on the left."""
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("every prompt needs at least one token.")
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens, mask


def assemble(
    prompt_tokens: Tensor,  # int64 [rows, prompt width], padded on the left
    prompt_mask: Tensor,  # int64 [rows, prompt width]
    responses: Tensor,  # int64 [rows, response width]; what follows an EOS is ignored
    eos_id: int,
    pad_id: int,
) -> Rollout:
    """A rollout from generated tokens: each response is kept up to its first EOS."""
    ends = responses == eos_id
    response_mask = (ends.cumsum(-1) - ends.long()) == 0
    tokens = torch.cat([prompt_tokens, responses.masked_fill(~response_mask, pad_id)], dim=1)
    attention = torch.cat([prompt_mask, response_mask.long()], dim=1)
    return Rollout(tokens, attention, response_mask.float(), ends.any(-1))


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    batch_size: int,
) -> Rollout:
    """One response for each prompt (token ids, used as they are), with the global torch seed."""
    generator: Any = policy  # transformers types `generate` on a mixin
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    tokens, mask = (part.to(policy.device) for part in pad_left(prompts, pad_id))
    width = tokens.shape[1]
    responses = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        output = generator.generate(
            input_ids=tokens[rows], attention_mask=mask[rows], generation_config=settings
        )
        responses.append(output[:, width:])
    longest = max(part.shape[1] for part in responses)
    padded = [
        torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad_id)
        for part in responses
    ]
    return assemble(tokens, mask, torch.cat(padded), eos_id, pad_id)
