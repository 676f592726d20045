"""A torch.cuda that has devices and streams and records what is asked of them, on a CPU.

What it knows of CUDA: a stream belongs to a device; entering a stream makes its device the current
one; a graph is captured on a stream, by whoever is current then; a capture in which the host waits
for the device is invalid, and its end raises before torch has put anything back.
"""

import contextlib
import types
import warnings

import torch


class Stream:
    def __init__(self, device=None, fake=None):
        self.device, self.fake = device, fake

    def wait_stream(self, other):
        self.fake.events.append(("wait", self.device.index, other.device.index))


class Graph:
    def __init__(self, fake):
        self.fake, self.on = fake, None

    def replay(self):
        self.fake.events.append(("replay", self.fake.current.index, self.on))


class Generator:
    """A device's generator; capturing belongs to its state."""

    def __init__(self):
        self.state = types.SimpleNamespace(capturing=False)

    def clone_state(self):
        clone = Generator()
        clone.state.capturing = self.state.capturing
        return clone

    def graphsafe_set_state(self, other):
        self.state = other.state

    def sample(self):
        if self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly")


class FakeCuda:
    """Put in the place of torch.cuda's functions by `install`."""

    def __init__(self, devices=2):
        self.devices = [torch.device("cuda", i) for i in range(devices)]
        self.current = self.devices[0]
        self.default = [Stream(device, self) for device in self.devices]
        self.streams = list(self.default)
        self.generators = [Generator() for _ in self.devices]
        self.made, self.events, self.captures = [], [], []
        self.capturing = self.waited = False
        self.mode = 0
        self.ended_pools = []

    def install(self, monkeypatch):
        functions = {
            "Stream": self.new_stream,
            "current_stream": lambda device=None: self.streams[(device or self.current).index],
            "current_device": lambda: self.current.index,
            "stream": self.stream,
            "device": self.device,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.graph,
            "graph_pool_handle": lambda: ("pool", self.current.index),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "default_generators": self.generators,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        ended = lambda index, pool: self.ended_pools.append((index, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)

    def new_stream(self, device=None):
        self.made.append(Stream(torch.device(device) if device else self.current, self))
        return self.made[-1]

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device)
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        index = stream.device.index
        before, self.streams[index] = self.streams[index], stream
        with self.device(stream.device):
            try:
                yield
            finally:
                self.streams[index] = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert stream is not None, "torch keeps one stream of its own, of whichever device"
        index = stream.device.index
        self.captures.append((self.current.index, index, pool))
        before = self.streams[index]
        self.streams[index], self.capturing, self.waited = stream, True, False
        self.generators[index].state.capturing = True
        graph.on = index
        try:
            yield
        finally:
            self.capturing = False
            if self.waited:
                # As torch does: the stream, the generator and the allocator stay as they are.
                raise RuntimeError("operation failed due to a previous error during capture")
            self.generators[index].state.capturing = False
            self.streams[index] = before

    def launch(self):
        """What a forward does: work on the current stream of the current device."""
        index = self.current.index
        self.events.append(("launch", index, self.streams[index].device.index))

    def wait(self):
        """The host waits for the device, as `.item()` does."""
        if self.capturing:
            self.waited = True
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.mode in ("warn", 1):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
