"""A value head on the policy's own hidden states: one linear layer, or two.

    V(s) = transform(w · h(s) + b)                      h(s): the last hidden state of s, after
    V(s) = transform(w · act(W h(s) + c) + b)           the policy's final norm

Our file is a safetensors file, `trunk_head.safetensors` where it stands in a folder:

    head.weight    [1, hidden], or [1, width] behind an inner layer; any float
    head.bias      [1]; may be missing
    inner.weight   [width, hidden]; only with two layers
    inner.bias     [width]; may be missing

Its header's metadata has one entry of ours, `guided_decode`, a JSON object: {"kind": "trunk-head",
"version": 1, "activation": "gelu", "transform": "identity", "trunk": {"name", "model_type",
"hidden_size", "num_hidden_layers", "vocab_size", "fingerprint"}}. `trunk` says what the head was
trained on, and `fingerprint` (`trunk_head_identity.fingerprint`) tells its weights from others.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from guided_decode.kernels import value_head
from guided_decode.kernels.norm import Norm, rms_norm
from guided_decode.scoring.transforms import Identity, Transform

KIND = "trunk-head"
FILE_NAME = "trunk_head.safetensors"
METADATA = "guided_decode"
VERSION = 1

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True)
class InnerLayer:
    """weight: [width, hidden] any float. bias: [width] or None. activation: of `ACTIVATIONS`."""

    weight: Tensor
    bias: Tensor | None
    activation: str

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, width] of hidden states [tokens, hidden]."""
        bias = None if self.bias is None else self.bias.float()
        return ACTIVATIONS[self.activation](F.linear(hidden.float(), self.weight.float(), bias))

    def to(self, device: torch.device) -> "InnerLayer":
        """The same layer on a device, in float32."""
        bias = None if self.bias is None else self.bias.detach().to(device, torch.float32)
        return replace(self, weight=self.weight.detach().to(device, torch.float32), bias=bias)


@dataclass(frozen=True, slots=True)
class TrunkRecord:
    """The trunk that a head was trained on; fingerprint: None where it cannot be told."""

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class TrunkHead:
    """A head, ready to read hidden states.

    weight: [1, hidden or width] any float. bias: [1] or None. inner: the first of two layers.
    transform: from the head's output to a value. trunk: what it was trained on, where that is
    known. norm: the policy's final norm, where hidden states come from before it.
    """

    weight: Tensor
    bias: Tensor | None = None
    inner: InnerLayer | None = None
    transform: Transform = Identity()  # noqa: RUF009 - a frozen record
    trunk: TrunkRecord | None = None
    norm: Norm | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Values of hidden states [tokens, hidden], float32 [tokens]."""
        if self.inner is not None:
            normed = hidden if self.norm is None else rms_norm(hidden, self.norm)
            return self.transform(value_head(self.inner(normed), self.weight, self.bias))
        if self.norm is None:
            return self.transform(value_head(hidden, self.weight, self.bias))
        weight, eps, offset = self.norm
        output = value_head(
            hidden, self.weight, self.bias, norm_weight=weight, norm_eps=eps, norm_offset=offset
        )
        return self.transform(output)

    @property
    def hidden_size(self) -> int:
        """The size of the hidden states that it reads."""
        return (self.weight if self.inner is None else self.inner.weight).shape[1]

    def to(self, device: torch.device) -> "TrunkHead":
        """The same head on a device, in float32."""

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(device, torch.float32)

        inner = None if self.inner is None else self.inner.to(device)
        return replace(self, weight=moved(self.weight), bias=moved(self.bias), inner=inner)


def save_trunk_head(path: str | Path, head: TrunkHead) -> None:
    """Writes our file, under `path` itself or as `FILE_NAME` in it where it is a folder."""
    tensors = {"head.weight": head.weight, "head.bias": head.bias}
    if head.inner is not None:
        tensors |= {"inner.weight": head.inner.weight, "inner.bias": head.inner.bias}
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "activation": None if head.inner is None else head.inner.activation,
        "transform": str(head.transform),
        "trunk": None if head.trunk is None else asdict(head.trunk),
    }
    stored = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    path = Path(path)
    save_file(
        stored,
        path / FILE_NAME if path.is_dir() else path,
        metadata={"format": "pt", METADATA: json.dumps(metadata, sort_keys=True)},
    )


def head_of_module(module: nn.Module) -> TrunkHead:
    """The head of nn.Linear, or of nn.Sequential(Linear, activation, Linear); dropout is dropped.

    Raises ValueError: any other module.
    """
    layers = [module] if isinstance(module, nn.Linear) else list(module.children())
    layers = [layer for layer in layers if not isinstance(layer, nn.Dropout | nn.Identity)]
    if len(layers) == 1 and isinstance(layers[0], nn.Linear):
        return TrunkHead(layers[0].weight.detach(), _detached(layers[0].bias))
    if len(layers) == 3:
        first, activation, last = layers
        name = type(activation).__name__.lower()
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and name in ACTIVATIONS:
            inner = InnerLayer(first.weight.detach(), _detached(first.bias), name)
            return TrunkHead(last.weight.detach(), _detached(last.bias), inner)
    raise ValueError(
        f"head came as {type(module).__name__}({', '.join(type(each).__name__ for each in layers)})"
        f": expected nn.Linear, or nn.Sequential(nn.Linear, activation, nn.Linear) with one of "
        f"{', '.join(ACTIVATIONS)}; pass its layers so"
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
