"""Quantised weights: the names that `load_scorer(quantization=...)` takes, and what a checkpoint
says of itself. The libraries are those that transformers uses; none of it is ours."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

# The modules that each optional extra of this package brings.
EXTRAS = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao", "accelerate"),
    "gguf": ("gguf", "accelerate"),
}
# The fields of transformers' configs that name modules which stay as they are.
_KEPT_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")

QuantizationLike = str | QuantizationConfigMixin


class MissingLibrary(ImportError, ValueError):
    """What was asked for needs a library that is not installed."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are quantised while they are loaded.

    name: what errors and `load_scorer` call it. make: transformers' config for a dtype of the
    activations. extra: of this package, that brings its library; None where transformers says what
    is missing. gpu: whether it has no kernels for a CPU. dtype: the only one that its kernels
    compute in; None where any will do. named: whether the config names modules, which it does as
    the checkpoint's whole class has them. What it takes in bytes is `plan.weight_forms`.
    """

    name: str
    make: Callable[[torch.dtype], Any]
    extra: str | None = None
    gpu: bool = False
    dtype: torch.dtype | None = None
    named: bool = False

    def config(self, dtype: torch.dtype, kept: tuple[str, ...] = ()) -> Any:
        """What `from_pretrained` takes. kept: modules that stay in full precision as well."""
        config = self.make(dtype)
        for field in _KEPT_FIELDS if kept else ():
            if hasattr(config, field):
                setattr(config, field, [*(getattr(config, field) or ()), *kept])
        return config


def _four_bits(dtype: torch.dtype) -> Any:
    # QLoRA's own choice: its second quantisation takes the scales from 0.5 to 0.127 bits a weight.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _eight_bits(dtype: torch.dtype) -> Any:
    # With a threshold a token's output depends on which tokens share its forward.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def _int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _int4(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    # The packing whose kernel is torch's own.
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    )


def _fp8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    # One scale a token, so that no token's output depends on another's.
    return TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


_BF16 = torch.bfloat16
QUANTIZATIONS: dict[str, Quantization] = {
    each.name: each
    for each in (
        Quantization("bnb-4bit", _four_bits, "bitsandbytes"),
        Quantization("bnb-8bit", _eight_bits, "bitsandbytes"),
        Quantization("int8", _int8, "torchao"),
        Quantization("int4", _int4, "torchao", gpu=True, dtype=_BF16),
        Quantization("fp8", _fp8, "torchao", gpu=True, dtype=_BF16),
    )
}


def read_quantization(given: QuantizationLike | None) -> Quantization | None:
    """How weights are to be quantised, by one of `QUANTIZATIONS` or transformers' own config.

    Raises ValueError: it is neither, or its library is not installed.
    """
    if given is None:
        return None
    if isinstance(given, QuantizationConfigMixin):
        return Quantization(type(given).__name__, lambda dtype: copy.deepcopy(given), named=True)
    if not isinstance(given, str) or given not in QUANTIZATIONS:
        raise ValueError(
            f"quantization={given!r}: expected one of {', '.join(QUANTIZATIONS)}, or a "
            "quantization config of transformers"
        )
    found = QUANTIZATIONS[given]
    assert found.extra is not None
    need(found.extra, f"quantization={given!r}")
    return found


def need(extra: str, what: str) -> None:
    """Raises MissingLibrary: a module that an extra of this package brings is not installed."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingLibrary(
            f"{what} needs {' and '.join(missing)}, which is not installed: "
            f"pip install 'guided-decode[{extra}]'"
        )


def check_device(
    quantization: Quantization, device: torch.device | None, dtype: torch.dtype | None
) -> None:
    """Raises ValueError: it has no kernels there, or none that compute in that dtype."""
    asked = f"quantization={quantization.name!r}"
    on_cpu = device is None or device.type == "cpu"
    if quantization.gpu and on_cpu:
        others = [each.name for each in QUANTIZATIONS.values() if not each.gpu]
        raise ValueError(
            f"{asked} has kernels for GPUs only, and the device is the CPU: pass "
            f'device="cuda", or one of {", ".join(others)}'
        )
    if quantization.dtype is not None and dtype not in (None, quantization.dtype):
        raise ValueError(
            f"{asked} computes in {str(quantization.dtype)[6:]}: expected that dtype, or none, and "
            f"got {str(dtype)[6:]}"
        )


def stored_method(config: PreTrainedConfig) -> str | None:
    """How a model's weights are quantised already, as its config says; None where they are not."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    bits = next((n for n in (4, 8) if fields.get(f"load_in_{n}bit")), None)
    return f"{method or 'method unknown'}{f', {bits} bits' if bits else ''}"


def check_stored(name: str, config: PreTrainedConfig) -> None:
    """Raises ValueError: weights on disk are quantised by a method that transformers does not
    know, or whose library is not installed."""
    method = stored_method(config)
    if method is None:
        return
    word = method.partition(",")[0]
    known = sorted({each.partition("_4bit")[0].partition("_8bit")[0]
                    for each in AUTO_QUANTIZATION_CONFIG_MAPPING})  # fmt: skip
    if word not in known:
        raise ValueError(
            f"{name} is quantised by {word}, which this transformers does not read: expected one "
            f"of {', '.join(known)}; pass another checkpoint of the model, or one in full precision"
        )
    if word in EXTRAS:
        need(word, f"{name} is quantised ({method}), which")


def settle_stored(config: PreTrainedConfig, on_cpu: bool) -> None:
    """Sets how transformers is to run weights that are stored quantised, where it has a choice.

    compressed-tensors unpacks at the first forward of the whole model, of which only the trunk is
    kept: here weights are unpacked as they load, or stay in 8 bits where a GPU has kernels for it.
    """
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return
    groups = settings.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, dict)]
    fp8 = all(each.get("type") == "float" and each.get("num_bits") == 8 for each in weights)
    runs = not on_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    settings["dequantize"] = not (fp8 and runs)
    settings["use_optimized_inference"] = fp8 and runs


def refuse_twice(
    name: str, quantization: Quantization, config: PreTrainedConfig, *, in_memory: bool
) -> None:
    """Raises ValueError: weights that are quantised already, or in memory, were to be quantised."""
    asked, method = f"quantization={quantization.name!r}", stored_method(config)
    if method is not None:
        raise ValueError(
            f"{name} is quantised already ({method}), and {asked} was given: drop it, or pass the "
            "checkpoint in full precision"
        )
    if in_memory:
        raise ValueError(
            f"{asked} was given for {name}, a model in memory: weights are quantised while they "
            "load; pass its name or path, or load it so with transformers' from_pretrained"
        )
