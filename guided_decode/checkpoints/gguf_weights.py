"""The weights of GGUF files, unpacked by transformers."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from guided_decode.checkpoints.how_loaded import HowLoaded
from guided_decode.checkpoints.load_report import check_report, from_pretrained, of_trunk
from guided_decode.checkpoints.quantization import Quantization
from guided_decode.checkpoints.source import Source


def load_gguf(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    how: HowLoaded,
    *,
    trunk: bool,
) -> PreTrainedModel:
    """A GGUF file as a causal LM, or its trunk.

    Where the config beside it is of another class than its header (llama.cpp calls a Mistral a
    Llama), it is that class on these weights.

    Raises ValueError: weights are missing or of another shape, or they were to be quantised again.
    """
    weights = source.decoder_files
    assert weights is not None
    assert weights.gguf is not None
    if how.quantization is not None:
        refuse_packed(source, how.quantization)
    file = weights.gguf.path.name
    config = AutoConfig.from_pretrained(weights.location, revision=weights.revision, gguf_file=file)
    same = config.model_type == source.config.model_type
    on_cpu = device is None or torch.device(device).type == "cpu"
    unpacked = torch.float32 if on_cpu and how.device_map is None else torch.bfloat16
    given = {
        "config": source.config if same else config,
        "revision": weights.revision,
        "gguf_file": file,
        "dtype": dtype or getattr(source.config, "dtype", None) or unpacked,
    }
    given |= how.options(source, dtype, device, AutoModelForCausalLM, trunk=trunk)
    model, report = from_pretrained(source, AutoModelForCausalLM, given)
    how.check_placed(model, source.name)
    if trunk:
        model, report = of_trunk(model, report)
    check_report(source, report)
    return model if same else _as_class_of(source, model, trunk=trunk)


def refuse_packed(source: Source, quantization: Quantization) -> None:
    """Raises ValueError: the weights of a GGUF file were to be quantised."""
    if source.is_gguf:
        raise ValueError(
            f"{source.name} is a GGUF file, whose weights are quantised already, and quantization="
            f"{quantization.name!r} was given: drop it, or pass the checkpoint that the file was "
            "converted from"
        )


def _as_class_of(source: Source, model: PreTrainedModel, *, trunk: bool) -> PreTrainedModel:
    """The config's own class on the weights of another one, whose weights have the same names.

    Raises ValueError: the weights lie on several devices.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModel

    if len({weight.device for weight in model.parameters()}) > 1:
        raise ValueError(
            f"{source.name} is a {source.config.model_type} by the config.json beside it and a "
            f"{model.config.model_type} by its header, which lies on one device only: drop "
            "device_map, or pass the checkpoint that the file was converted from"
        )
    auto_class = AutoModel if trunk else AutoModelForCausalLM
    # Buffers are computed from the config.
    with init_empty_weights(include_buffers=False):
        own = auto_class.from_config(source.config, dtype=model.dtype)
    own.load_state_dict(model.state_dict(), assign=True)
    moved: PreTrainedModel = own.to(model.device)
    return moved
