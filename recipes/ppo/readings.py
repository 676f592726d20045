"""What the networks say about a rollout: one number for each generated token.

Both slices are positions PL−1 … L−2 (PL: prompt width, L: whole width): the output at the token
before the one that is generated. So V is the value before a token, and the output at EOS is
never read.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.ppo.rollout import Rollout


def token_logps(policy: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Log-probability, at temperature 1, of each generated token; float32 [rows, width]."""
    logits = _outputs(policy, rollout)
    chosen = logits.float().log_softmax(-1).gather(-1, rollout.responses[..., None])
    return chosen[..., 0]


def token_values(value_model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """V before each generated token, in reward units; float32 [rows, width]."""
    return _outputs(value_model, rollout)[..., 0].float()


@torch.no_grad()
def in_batches(
    read: Callable[[PreTrainedModel, Rollout], Tensor],
    model: PreTrainedModel,
    rollout: Rollout,
    size: int,
) -> Tensor:
    """`read(model, rollout)` without gradients, at most `size` rows at a time."""
    every = torch.arange(len(rollout.tokens), device=rollout.tokens.device)
    return torch.cat([read(model, rollout.rows(index)) for index in every.split(size)])


def _outputs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """The model's logits at PL−1 … L−2, [rows, response width, labels or vocabulary]."""
    wanted = rollout.response_mask.shape[1] + 1
    # A causal LM's logits over the prompt would be most of the memory.
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    outputs = model(
        input_ids=rollout.tokens,
        attention_mask=rollout.attention,
        position_ids=rollout.positions,
        use_cache=False,
        **({"logits_to_keep": wanted} if takes else {}),
    )
    return outputs.logits[:, -wanted:-1]
