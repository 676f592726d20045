"""The dtype and device that a caller names, as torch's own."""

import torch

from guided_decode.checkpoints.adapted import is_in_memory

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
}

DType = str | torch.dtype
Device = str | int | torch.device


def read_dtype(given: DType | None) -> torch.dtype | None:
    """The dtype of a name; None and "auto" keep the checkpoint's.

    Raises ValueError: it is no dtype of weights.
    """
    if given is None or (isinstance(given, str) and given == "auto"):
        return None
    named = str(given).removeprefix("torch.")
    if not isinstance(given, DType) or named not in _DTYPES:
        raise ValueError(
            f"dtype={given!r}: expected one of {', '.join(_DTYPES)}, torch's own of these, or None "
            "(the checkpoint's)"
        )
    return _DTYPES[named]


def read_device(given: Device | None) -> torch.device | None:
    """The device of a name; None is the CPU, or where the given model is.

    Raises ValueError: it is no device, or none that this machine has.
    """
    if given is None:
        return None
    expected = (
        'expected a device of this machine, "cpu" or "cuda:1", say, or None (the CPU, or where the '
        "given model is)"
    )
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={given!r} names no device: {expected}") from error
    try:
        torch.empty(0, device=device)
    # torch says AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"device={given!r} cannot be used ({said}): {expected}") from error
    return device


def settled_dtype(
    model: object,
    device: torch.device | None,
    dtype: torch.dtype | None,
    computed: torch.dtype | None = None,
) -> torch.dtype | None:
    """The dtype that was asked for, or the only one that a quantisation computes in; float32 for
    files on a CPU; None keeps the checkpoint's."""
    on_cpu = device is None or device.type == "cpu"
    if computed is not None and dtype is None:
        return computed
    if dtype is not None or is_in_memory(model) or not on_cpu:
        return dtype
    return torch.float32
