"""Calls that come on different CUDA streams: on the device, too, one follows the other."""

from typing import Any

import torch


class StreamOrder:
    """What a lock is between threads, between the streams that they launch their work on.

    The slots that one call writes are the next one's keys and values, whatever stream that runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamOrder":
        return StreamOrder(self._device)

    def begin(self) -> None:
        """The current stream waits for what the last call launched, if that was another one."""
        if self._device.type != "cuda":
            return
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current
