"""A trunk in two parts: the frozen lower layers, read once a rollout, and the layers above them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def share(module: nn.Module) -> Any:
    """A copy of a module that has the same weights in memory: adapters in one leave the other."""
    kept = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def stack(trunk: Any, first: int, last: int, norm: nn.Module) -> Any:
    """Layers [first, last) of a decoder as a decoder of their own, with `norm` behind them.

    Its modules are the trunk's; it takes hidden states as `inputs_embeds`.
    """
    config = copy.deepcopy(trunk.config)
    config.num_hidden_layers = last - first
    with torch.device("meta"):
        part = type(trunk)(config)
    part.embed_tokens, part.rotary_emb, part.norm = trunk.embed_tokens, trunk.rotary_emb, norm
    part.layers = nn.ModuleList(trunk.layers[first:last])
    return part.eval()


def multiply_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Within it products are taken in `dtype`; of float32 weights, float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class LowerLayers:
    """Hidden states below the adapted layers; those of the latest rows are remembered.

    Rows of one rollout are as wide as each other, and come again at every reading and update.

    Args:
        trunk: a decoder; its first `layers` layers are read, without gradients.
        rows: how many rows are remembered.
        dtype: of the products; what is remembered is float32.
    """

    def __init__(self, trunk: Any, layers: int, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._stack, self._rows = stack(trunk, 0, layers, nn.Identity()), rows
        self._known: dict[bytes, Tensor] = {}
        self.rows_read = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """float32 [rows, width, hidden] of int64 [rows, width] three times."""
        keys = [row.numpy().tobytes() for row in torch.stack([tokens, attention], 1).cpu()]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            with multiply_in(self.dtype, tokens.device):
                hidden = self._stack(
                    inputs_embeds=self._stack.embed_tokens(tokens[new]),
                    attention_mask=attention[new],
                    position_ids=positions[new],
                    use_cache=False,
                ).last_hidden_state.float()
            self._known |= {keys[i]: row for i, row in zip(new, hidden, strict=True)}
            self.rows_read += len(new)
        found = torch.stack([self._known[key] for key in keys])
        # The oldest first.
        for key in list(self._known)[: max(0, len(self._known) - self._rows)]:
            del self._known[key]
        return found
