"""Where weights go while they are loaded: one device, or each module on one of several."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from guided_decode.checkpoints.precision import Device, read_device
from guided_decode.checkpoints.quantization import MissingLibrary

# accelerate's own ways of sharing a model out.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")

DeviceMapLike = str | Mapping[str, Device]
DeviceMap = str | dict[str, torch.device]


def read_device_map(given: DeviceMapLike | None, device: Device | None) -> DeviceMap | None:
    """A device map, with torch's devices in the place of names.

    Raises ValueError: it is none, names a device that this machine does not have, came with a
    device, or accelerate is not installed.
    """
    if given is None:
        return None
    if device is not None:
        raise ValueError(
            f"device={device!r} and device_map={given!r} were both given: expected one of the two; "
            "a device map says where each module goes"
        )
    if not has_accelerate():
        raise MissingLibrary(
            f"device_map={given!r} needs accelerate, which is not installed: pip install accelerate"
        )
    if isinstance(given, str) and given in SPREADS:
        return given
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"device_map={given!r}: expected one of {', '.join(SPREADS)}, or a dict of module "
            'names to devices, {"model.layers.0": "cuda:0", ...}; for one device pass device='
        )
    return {str(module): _device(str(module), place) for module, place in given.items()}


def first_device(device_map: DeviceMap) -> torch.device:
    """Where a model's inputs go."""
    if isinstance(device_map, str):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return next(iter(device_map.values()))


def _device(module: str, place: object) -> torch.device:
    try:
        device = read_device(place)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"device_map sends {module or 'the model'} to {place!r}: {error}"
        ) from error
    if device is None or device.type == "meta":
        raise ValueError(
            f"device_map sends {module or 'the model'} to {place!r}, which holds no weights: "
            "expected a device of this machine"
        )
    return device


def has_accelerate() -> bool:
    """Whether weights can be read straight to where they go; else they pass through the CPU."""
    return find_spec("accelerate") is not None


def for_loading(
    device_map: DeviceMap | None,
    device: torch.device | str | None,
    *,
    always: bool,
    prefix: str = "",
    others: tuple[str, ...] = (),
) -> Any:
    """What `from_pretrained` takes as device_map; None where weights are moved afterwards.

    Args:
        device_map: as `read_device_map` gives it.
        device: one device for all; None is the CPU.
        always: a device must be named, else transformers picks one.
        prefix: under which the class that is loaded has its trunk, with the dot; "" for a trunk.
        others: modules of that class outside its trunk, for which a map of the trunk has no place.
    """
    if isinstance(device_map, str):
        return device_map
    if device_map is not None:
        return _named(device_map, prefix, others)
    place = torch.device("cpu") if device is None else torch.device(device)
    if always or (place.type != "cpu" and has_accelerate()):
        return {"": place}
    return None


def _named(
    device_map: dict[str, torch.device], prefix: str, others: tuple[str, ...]
) -> dict[str, torch.device]:
    """The map by the names of the class that is loaded, whichever class it was written for."""
    own = {name if not name or f"{name}.".startswith(prefix) or name in others else prefix + name:
           place for name, place in device_map.items()}  # fmt: skip
    if "" in own:
        return own
    last = list(own.values())[-1]
    return own | {name: own.get(name, last) for name in others}


def of_trunk(device_map: DeviceMap | None, prefix: str) -> DeviceMap | None:
    """The map by the names of a trunk, where it was written for a class around it.

    prefix: under which that class has the trunk, with the dot.
    """
    if device_map is None or isinstance(device_map, str):
        return device_map
    whole = any(name.startswith(prefix) or name == prefix[:-1] for name in device_map)
    if not whole:
        return device_map
    return {name.removeprefix(prefix) if name != prefix[:-1] else "": place
            for name, place in device_map.items()
            if name.startswith(prefix) or name in ("", prefix[:-1])}  # fmt: skip


def refuse_offloaded(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError: weights wait on the CPU or a disk, from where a step would move them."""
    placed = getattr(model, "hf_device_map", None) or {}
    places = {str(place) for place in placed.values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        waiting = [module for module, place in placed.items() if str(place) in ("cpu", "disk")]
        raise ValueError(
            f"{name} does not fit the GPUs of its device_map: {', '.join(waiting[:3])}"
            f"{f' and {len(waiting) - 3} more' if len(waiting) > 3 else ''} would wait on the CPU "
            "or a disk, and every step would move them; pass quantization=, or add GPUs"
        )


def refuse_waiting(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError: a model in memory has weights that hooks bring in at each forward."""
    waiting = next((each for each, weight in model.named_parameters() if weight.is_meta), None)
    if waiting is not None:
        raise ValueError(
            f"{name} is in memory without all of its weights ({waiting} is on the meta device, and "
            "waits on the CPU or a disk at best): expected all of them on devices; load it where "
            "there is room, or pass its name with quantization= or device_map="
        )


def refuse_unknown_modules(
    device_map: DeviceMap, model: PreTrainedModel, name: str, prefix: str
) -> None:
    """Raises ValueError: a device map names what no model of this class has, which would be left
    out in silence.

    prefix: under which a class with a head has its trunk, with the dot.
    """
    if isinstance(device_map, str):
        return
    parts = [part for part, _ in (*model.named_modules(), *model.named_parameters())]
    known = {"", prefix[:-1], "score", "lm_head", *parts}
    known |= {prefix + part for part in parts} | {part.removeprefix(prefix) for part in parts}
    if unknown := [module for module in device_map if module not in known]:
        raise ValueError(
            f"device_map names {', '.join(unknown[:3])}, which {name} does not have: expected its "
            f"modules, {prefix}layers.0 say, or layers.0 of its trunk; mend the map"
        )
