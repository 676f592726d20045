"""The slot pool: preallocated keys and values, one slot a token, and which slots are free."""

from collections.abc import Sequence

import numpy as np
import torch

from guided_decode.growable import Ints


class SlotPool:
    """KV memory for `capacity` tokens, and each cached token's value.

    keys[layer], layer_values[layer]: [capacity + 1, kv_heads, head_dim] of the model's dtype.
    values: float32 [capacity + 2], V at the token in the slot; NaN at index −1. Slot `capacity` is
    never handed out: the padding of a CUDA graph writes there. A layer's keys and values lie where
    the layer does, `values` where the model's inputs go.
    """

    def __init__(
        self,
        capacity: int,
        layer_shapes: list[tuple[int, int, int]],
        dtype: torch.dtype,
        device: torch.device,
        layer_devices: Sequence[torch.device] | None = None,
    ) -> None:
        """
        Args:
            capacity: tokens.
            layer_shapes: (kv_heads, key_dim, value_dim) of each layer.
            dtype: of keys and values.
            device: of the values at tokens, and of the layers' keys and values.
            layer_devices: of each layer's, where a model lies on several.
        """
        places = layer_devices or [device] * len(layer_shapes)
        self.capacity = capacity
        # Memory that was never written is never read: it is left as it comes.
        slots = capacity + 1
        self.keys = [
            torch.empty(slots, heads, dim, dtype=dtype, device=place)
            for (heads, dim, _), place in zip(layer_shapes, places, strict=True)
        ]
        self.layer_values = [
            torch.empty(slots, heads, dim, dtype=dtype, device=place)
            for (heads, _, dim), place in zip(layer_shapes, places, strict=True)
        ]
        self.values = torch.empty(slots + 1, dtype=torch.float32, device=device)
        self.values[-1] = torch.nan
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int64)
        self._free_count = capacity

    def like(self, capacity: int) -> "SlotPool":
        """An empty pool for the same model, of another capacity."""
        layers = zip(self.keys, self.layer_values, strict=True)
        shapes = [(k.shape[1], k.shape[2], v.shape[2]) for k, v in layers]
        places = [keys.device for keys in self.keys]
        return SlotPool(capacity, shapes, self.keys[0].dtype, self.device, places)

    @property
    def free_slots(self) -> int:
        return self._free_count

    @property
    def free_ids(self) -> Ints:
        """The free slots, int64 [free_slots]."""
        return self._free[: self._free_count]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_spread(self) -> bool:
        """Whether layers lie on another device than the values do."""
        return any(keys.device != self.device for keys in self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the pool holds."""
        tensors = [*self.keys, *self.layer_values, self.values]
        return sum(tensor.nbytes for tensor in tensors)

    def take(self, count: int) -> Ints:
        """Slots for `count` tokens, int64 [count]; runs of neighbours where there are any."""
        assert count <= self._free_count
        taken = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        return taken

    def give_back(self, slots: Ints) -> None:
        """Frees slots, int64 [n], none of which is free."""
        self._free[self._free_count : self._free_count + len(slots)] = slots[::-1]
        self._free_count += len(slots)

    def reset(self) -> None:
        """Frees every slot."""
        self._free[:] = np.arange(self.capacity - 1, -1, -1, dtype=np.int64)
        self._free_count = self.capacity
