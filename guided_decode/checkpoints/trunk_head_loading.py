"""Reading a trunk head: our file, a checkpoint of the same trunk, a module, or its tensors."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from guided_decode.checkpoints.arrival import opened_safetensors
from guided_decode.checkpoints.source import Source, open_source
from guided_decode.checkpoints.trunk_head_identity import (
    check_recorded,
    check_same_adapter,
    check_same_weights,
)
from guided_decode.scoring.transforms import Transform, parse_transform
from guided_decode.scoring.trunk_head import (
    ACTIVATIONS,
    FILE_NAME,
    KIND,
    METADATA,
    VERSION,
    InnerLayer,
    TrunkHead,
    TrunkRecord,
    head_of_module,
)

HeadLike = str | Path | nn.Module | Mapping[str, Tensor] | TrunkHead

# Modules that may hold the head's last layer: ours, TRL's, token classification's, a bare layer's.
_PLACES = ("head", "v_head.summary", "summary", "score", "value_head", "v_head", "")
_INNER = "inner"


def read_trunk_head(
    head: HeadLike,
    *,
    transform: str | Transform | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> TrunkHead:
    """A head as it comes; `load_trunk_head` also holds it to the policy's trunk.

    Args:
        head: our safetensors file or the folder or Hub repository that has it; a checkpoint with
            TRL's `v_head.summary` or a token classifier's `score` (path, Hub id or model);
            nn.Linear or nn.Sequential(Linear, activation, Linear); tensors by the names of our
            file, TRL's or a token classifier's; or a TrunkHead.
        transform: overrides the file's; None is the file's, else identity.
        revision, allow_pickle, trust_remote_code: of a checkpoint.

    Raises:
        ValueError: nothing is found, tensors are missing, of shapes that do not belong together,
            or of several labels.
    """
    name, file = _name(head), None
    if isinstance(head, TrunkHead):
        found = head
    elif isinstance(head, Mapping):
        found = _of_tensors(name, head)
    elif isinstance(head, nn.Module) and not isinstance(head, PreTrainedModel):
        tensors = dict(head.named_parameters())
        found = _of_tensors(name, tensors) if "summary.weight" in tensors else head_of_module(head)
    elif not isinstance(head, PreTrainedModel) and (file := _own_file(head, revision)) is not None:
        found = _of_file(file, name)
    else:
        options: dict[str, Any] = {
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
        }
        found = _of_checkpoint(open_source(head, revision=revision, **options))
    if transform is not None:
        found = replace(found, transform=parse_transform(transform))
    _check_shapes(found, name)
    return found


def load_trunk_head(
    head: HeadLike, trunk: PreTrainedModel, policy: str, *, exact: bool = True, **options: Any
) -> TrunkHead:
    """A head that fits the policy's trunk, on its device in float32.

    Args:
        head: as of `read_trunk_head`; a checkpoint's trunk has to be the policy's.
        trunk: the policy's.
        policy: its name, for errors.
        exact: whether the trunk's weights are those that it was trained with, and not quantised.
        options: those of `read_trunk_head`.

    Raises:
        ValueError: as `read_trunk_head`; or another hidden size, or another trunk where that can
            be told.
    """
    found, name = read_trunk_head(head, **options), _name(head)
    if found.trunk is not None:
        check_recorded(trunk, policy, found.trunk, name, exact=exact)
    hidden = int(trunk.config.get_text_config().hidden_size)
    if found.hidden_size != hidden:
        raise ValueError(
            f"{name} reads hidden states of size {found.hidden_size}, but those of the policy "
            f"{policy} have {hidden}: expected a head that was trained on this policy's trunk"
        )
    apart = isinstance(head, PreTrainedModel) or (
        isinstance(head, str | Path) and _own_file(head, options.get("revision")) is None
    )
    if apart and exact:
        assert isinstance(head, str | Path | PreTrainedModel)
        options.pop("transform", None)
        source = open_source(head, **options)
        if source.adapter is None:
            check_same_weights(trunk, policy, source.tensor_names, source.tensor, name)
        elif source.name != policy:
            # Else it is the policy's own adapter, which is merged by now.
            adapter = {each: source.tensor(each) for each in source.own_names - _heads(source)}
            check_same_adapter(trunk, policy, adapter, name)
    return found.to(trunk.device)


def _heads(source: Source) -> set[str]:
    """The names of an adapter's weights that are those of a head."""
    return {
        name for name in source.own_names if name.rpartition(".")[0] in {*_PLACES, "lm_head"} - {""}
    }


def _name(head: HeadLike) -> str:
    """What errors call it."""
    if isinstance(head, str | Path):
        return str(head)
    if isinstance(head, PreTrainedModel):
        return head.config.name_or_path or type(head).__name__
    if isinstance(head, TrunkHead | nn.Module):
        return "the head"
    if isinstance(head, Mapping):
        return "the head's tensors"
    raise ValueError(
        f"head came as {type(head).__name__}: expected a path, a Hub id, a module or tensors by "
        "name"
    )


def _own_file(head: str | Path, revision: str | None) -> Path | None:
    """The safetensors file that is named, or ours in the folder or repository that is."""
    if Path(head).is_file():
        return Path(head)
    if str(head).endswith(".safetensors"):
        raise ValueError(f"head={str(head)!r}: no such file; pass the path of a trunk head")
    try:
        found = cached_file(
            str(head), FILE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        # Neither a folder nor a repository: the checkpoint's own error says so.
        return None
    return None if found is None else Path(found)


def _of_file(path: Path, name: str) -> TrunkHead:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{name} is a {path.suffix or 'nameless'} file: expected {FILE_NAME} or another "
            "safetensors file; convert it with guided_decode.scoring.trunk_head.save_trunk_head"
        )
    with opened_safetensors(path) as opened:
        header = (opened.metadata() or {}).get(METADATA)
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    metadata = _metadata(name, header)
    if metadata and (metadata.get("kind"), metadata.get("version")) != (KIND, VERSION):
        raise ValueError(
            f"{name} has kind {metadata.get('kind')!r} and version {metadata.get('version')!r} in "
            f"its metadata: expected {KIND!r} and {VERSION}; write it again with save_trunk_head"
        )
    found = _of_tensors(name, tensors, metadata.get("activation"))
    if metadata.get("transform"):
        found = replace(found, transform=parse_transform(metadata["transform"]))
    if metadata.get("trunk"):
        found = replace(found, trunk=_trunk_record(name, metadata["trunk"]))
    return found


def _metadata(name: str, header: str | None) -> dict[str, Any]:
    """Our entry of a file's header; empty where there is none."""
    try:
        metadata = {} if header is None else json.loads(header)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{name} has {str(header)[:60]!r} as {METADATA!r} in its metadata: expected a JSON "
            "object; write it again with save_trunk_head"
        )
    return metadata


def _trunk_record(name: str, given: Any) -> TrunkRecord:
    try:
        return TrunkRecord(**given)
    except TypeError as error:
        wanted = ", ".join(field.name for field in fields(TrunkRecord))
        raise ValueError(
            f"{name} says {str(given)[:60]} of its trunk: expected {wanted}; write it again with "
            "save_trunk_head"
        ) from error


def _of_checkpoint(source: Source) -> TrunkHead:
    names = source.tensor_names
    place = _place(names)
    if place is None:
        raise _no_head(source.name, names)
    wanted = [each for each in (f"{place}weight", f"{place}bias") if each in names]
    return _of_tensors(source.name, {each: source.tensor(each) for each in wanted})


def _of_tensors(
    name: str, tensors: Mapping[str, Tensor], activation: str | None = None
) -> TrunkHead:
    odd = next((key for key, value in tensors.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(
            f"{name} came with a {type(tensors[odd]).__name__} as {odd!r}: expected a tensor; pass "
            "torch.tensor(...) of it"
        )
    place = _place(tensors)
    if place is None:
        raise _no_head(name, tensors)
    inner = None
    if f"{_INNER}.weight" in tensors:
        if activation is None or activation not in ACTIVATIONS:
            raise ValueError(
                f"{name} has two layers and activation {activation!r}: expected one of "
                f"{', '.join(ACTIVATIONS)} in its metadata; pass a file that save_trunk_head "
                "wrote, or nn.Sequential(Linear, activation, Linear)"
            )
        bias = tensors.get(f"{_INNER}.bias")
        inner = InnerLayer(tensors[f"{_INNER}.weight"].detach(), bias, activation)
    elif activation is not None:
        raise ValueError(
            f"{name} has activation {activation!r} in its metadata but no {_INNER}.weight: "
            "expected both of a head with two layers; write it again with save_trunk_head"
        )
    bias = tensors.get(f"{place}bias")
    return TrunkHead(tensors[f"{place}weight"].detach(), bias, inner)


def _place(names: Any) -> str | None:
    """The prefix of the head's last layer among names of tensors: "" or one that ends in a dot."""
    places = (f"{place}." if place else "" for place in _PLACES)
    return next((place for place in places if f"{place}weight" in names), None)


def _no_head(name: str, names: Any) -> ValueError:
    wanted = ", ".join(f"{place}.weight" for place in _PLACES if place)
    return ValueError(
        f"{name} has no head: expected one of {wanted}, and found {', '.join(sorted(names)[:4])}"
        f"{' and more' if len(names) > 4 else ''}; pass a file that save_trunk_head wrote, or a "
        "checkpoint with a value head"
    )


def _check_shapes(head: TrunkHead, name: str) -> None:
    layers = [("head", head.weight, head.bias)]
    if head.inner is not None:
        layers.insert(0, (_INNER, head.inner.weight, head.inner.bias))
    width: int | None = None
    for layer, weight, bias in layers:
        if weight.ndim != 2 or (width is not None and weight.shape[1] != width):
            wanted = "[n, hidden]" if width is None else f"[n, {width}], behind the inner layer"
            raise ValueError(
                f"{name} has {layer}.weight of shape {list(weight.shape)}: expected {wanted}; "
                "write it again with save_trunk_head"
            )
        width = len(weight)
        if bias is not None and tuple(bias.shape) != (width,):
            raise ValueError(
                f"{name} has {layer}.bias of shape {list(bias.shape)}: expected [{width}], as its "
                "weight has rows; write it again with save_trunk_head"
            )
        for part, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} has NaN or infinity in {layer}.{part}: expected numbers")
    if not head.transform.fits(len(head.weight)):
        raise ValueError(
            f"{name} has {len(head.weight)} labels, which {head.transform} cannot read: expected "
            "one, a value; pass transform= (softmax:1, say) for a head with several"
        )
