"""What Triton would compile for the launches of a run that has no GPU: its own keys."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest

from tests.kernels.kernel_cases import Launch, recorded

OPERATIONS = ("top_candidates", "guide_logits", "lookahead_attention", "value_head")


class Compiled:
    """From now on each operation launches its kernels, none of which runs, and gives what its
    reference gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._launches = recorded(monkeypatch)
        for name in OPERATIONS:
            module = importlib.import_module(f"guided_decode.kernels.{name}")
            both = _both(getattr(module, f"{name}_triton"), getattr(module, f"{name}_reference"))
            monkeypatch.setattr(module, f"{name}_triton", both)
            monkeypatch.setattr(module, "on_gpu", lambda *tensors: True)

    def take(self) -> set[Any]:
        """The keys of what was launched since the last call: (kernel's name, what tells it)."""
        keys = {(launch.kernel.function.__name__, _key(launch)) for launch in self._launches}
        self._launches.clear()
        return keys


def by_kernel(keys: set[Any]) -> dict[str, int]:
    """How many variants there are of each kernel."""
    return dict(Counter(name for name, _ in keys))


def _both(launcher: Any, reference: Any) -> Any:
    def run(*arguments: Any) -> Any:
        launcher(*arguments)
        # Those of the launch's size are not the reference's.
        return reference(*arguments[: reference.__code__.co_argcount])

    return run


def _key(launch: Launch) -> str:
    """By what Triton looks a compiled kernel up: types, constants, alignments and options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    jitted, backend = launch.kernel.jitted, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(jitted.signature, jitted.params, backend)
    _, specialisation, options = bind(*launch.arguments, **launch.options)
    return f"{specialisation} {options}"
