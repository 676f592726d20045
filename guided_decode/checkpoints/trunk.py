"""Models as decoders of their own: on their own config, ready to score and never to train."""

import re

import torch
from transformers import AutoModel, PreTrainedModel

from guided_decode.checkpoints.adapter_loading import put_on, refuse_without_peft
from guided_decode.checkpoints.gguf_weights import load_gguf
from guided_decode.checkpoints.how_loaded import AS_STORED, HowLoaded
from guided_decode.checkpoints.load_report import check_report, from_pretrained, of_trunk
from guided_decode.checkpoints.own_copy import own_copy
from guided_decode.checkpoints.quantised_layers import is_quantised, settle_bitsandbytes
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.tensor_parallel import check_copied, check_vocabulary_divides
from guided_decode.forward.weights import Origin, comes_from


def load_trunk(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    how: HowLoaded = AS_STORED,
) -> PreTrainedModel:
    """The decoder without a head: token ids in, last hidden states out.

    Raises ValueError: weights are missing, of another shape, or left over.
    """
    if source.instance is not None:
        return _copy(source, dtype, device, trunk=True)
    return _finish_loaded(source, dtype, device, how, trunk=True)


def load_language_model(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    how: HowLoaded = AS_STORED,
) -> PreTrainedModel:
    """The decoder with its language-model head.

    Raises ValueError: as `load_trunk`, or it has no such head.
    """
    if source.instance is not None:
        if source.instance.get_output_embeddings() is None:
            raise ValueError(
                f"{source.name} is a {source.architecture}, which has no language-model head: "
                "expected a causal LM; pass one"
            )
        return _copy(source, dtype, device)
    if how.sharded is not None:
        check_vocabulary_divides(source, how.sharded.ranks.world)
    return _finish_loaded(source, dtype, device, how, trunk=False)


def load_decoded(source: Source, dtype: torch.dtype | None) -> PreTrainedModel:
    """A causal LM of files as it is decoded by `generate`: with its own attention.

    Raises ValueError: as `load_language_model`.
    """
    return _load(source, dtype, None, AS_STORED, trunk=False)


def _copy(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    trunk: bool = False,
) -> PreTrainedModel:
    """A copy of a model in memory, or of its trunk; made anew when the model has changed."""
    model, memory = source.instance, source.memory
    assert model is not None
    assert memory is not None
    check_copied(source, dtype)
    own = own_copy(model.base_model if trunk else model)
    copied = _finish(own, dtype, device, source.name)

    def again() -> PreTrainedModel:
        return _copy(memory.source(), dtype, device, trunk=trunk)

    return comes_from(copied, Origin((memory.watched,), again, memory.adapters))


def _finish_loaded(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    how: HowLoaded,
    *,
    trunk: bool,
) -> PreTrainedModel:
    loaded = _load(source, dtype, device, how, trunk=trunk)
    if how.sharded is not None:
        # Shards lie where they belong.
        dtype = device = None
    return _finish(loaded, dtype, device, source.name)


def _finish(
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    name: str,
) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    quantised = is_quantised(model)
    if quantised:
        settle_bitsandbytes(model, name)
    if quantised or _is_spread(model):
        _refuse_another_place(model, dtype, device, name)
        return model.eval()
    return model.eval().to(device=device, dtype=dtype)


def _is_spread(model: PreTrainedModel) -> bool:
    """Whether accelerate keeps its layers on several devices."""
    return len({weight.device for weight in model.parameters()}) > 1


def _refuse_another_place(
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    name: str,
) -> None:
    """Raises ValueError: weights that are quantised, or on several devices, stay as they are."""
    here = model.device
    wanted = here if device is None else torch.device(device)
    same = wanted.type == here.type and wanted.index in (None, here.index)
    if not same or dtype not in (None, model.dtype):
        what = "lies on several devices" if _is_spread(model) else f"is quantised, on {here}"
        raise ValueError(
            f"{name} {what} and computes in {str(model.dtype)[6:]}: it was asked for in "
            f"{str(dtype or model.dtype)[6:]} on {wanted}; load it so, or leave both out"
        )


def _load(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    how: HowLoaded,
    *,
    trunk: bool,
) -> PreTrainedModel:
    """The model of a source's files: of an adapter's its base, with the adapter in it."""
    if source.adapter is not None:
        refuse_without_peft(source)
    read = load_gguf if source.is_gguf else _load_files
    model = read(source, dtype, device, how, trunk=trunk)
    if source.adapter is not None and not put_on(model, source):
        model = read(source, dtype, device, how, trunk=trunk)
        put_on(model, source, merge=False)
    return model


def _load_files(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    how: HowLoaded,
    *,
    trunk: bool,
) -> PreTrainedModel:
    weights = source.decoder_files
    assert weights is not None
    auto_class = how.auto_class(source, trunk=trunk)
    given = {
        "config": source.config,
        "revision": weights.revision,
        "dtype": "auto" if dtype is None else dtype,
        "use_safetensors": not weights.pickle,
        "trust_remote_code": source.trust_remote_code,
        "key_mapping": {f"^{re.escape(weights.wrapper)}": ""} if weights.wrapper else None,
    }
    given |= how.options(source, dtype, device, auto_class, trunk=trunk)
    model, report = from_pretrained(source, auto_class, given)
    how.check_placed(model, source.name)
    if trunk and auto_class is not AutoModel:
        model, report = of_trunk(model, report)
    check_report(source, report)
    return model
