"""Loading a critic or a language model as its trainer's conventions ask, or refusing it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_decode.checkpoints.config_checks import check_config, settle_rope
from guided_decode.checkpoints.families import BosRule, Family
from guided_decode.checkpoints.head import Head, choose_transform, read_head
from guided_decode.checkpoints.how_loaded import HowLoaded
from guided_decode.checkpoints.kinds import choose_family
from guided_decode.checkpoints.placement import DeviceMap, refuse_waiting
from guided_decode.checkpoints.quantization import Quantization, check_stored, refuse_twice
from guided_decode.checkpoints.record import CHAT_TEMPLATE, Record
from guided_decode.checkpoints.source import ModelLike, Source, open_source
from guided_decode.checkpoints.tensor_parallel import check_divides
from guided_decode.checkpoints.tokenizer_files import load_tokenizer
from guided_decode.checkpoints.trunk import load_language_model, load_trunk
from guided_decode.forward.shards import Shards
from guided_decode.scorer import TerminalRule
from guided_decode.scoring.transforms import Transform, parse_transform
from guided_decode.scoring.trunk_head import InnerLayer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A critic, ready to be scored with.

    name: what it was loaded by. family: its conventions, with the BOS and terminal rules that
    were asked for. transform: from the head's output to a value. trunk: the decoder without a
    head, on its own config, in eval mode, with eager attention. head_weight: float32
    [labels, hidden]; head_bias: float32 [labels], or None; head_inner: the first layer of a head
    with two. tokenizer: None where the checkpoint
    has none. record: its entry in the registry, if it has one.
    """

    name: str
    family: Family
    transform: Transform
    trunk: PreTrainedModel
    head_weight: Tensor
    head_bias: Tensor | None
    tokenizer: PreTrainedTokenizerBase | None
    record: Record | None
    head_inner: InnerLayer | None = None

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the trunk was made for; None where its config sets none."""
        return getattr(self.trunk.config, "max_position_embeddings", None)

    @property
    def prompt_format(self) -> str | None:
        """The name of its prompt format; None is the tokenizer's own chat template."""
        if self.record is None:
            return self.family.prompt_format
        own = self.record.prompt_format
        return None if own == CHAT_TEMPLATE else own


def load_checkpoint(
    model: ModelLike | Source,
    kind: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    bos: BosRule | None = None,
    terminal: TerminalRule | None = None,
    transform: str | Transform | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    rope_theta: float | None = None,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    sharded: Shards | None = None,
    own_head: Callable[[Source], Head] | None = None,
) -> Checkpoint:
    """A critic of any kind but "implicit" and "trunk-head".

    Args:
        model: a registered name, a Hub id, a local path, or a transformers model, whose weights
            are then shared and which is not changed.
        kind: a family's; "auto" decides on positive evidence only.
        dtype: of the trunk; None keeps the checkpoint's.
        device: None is the CPU, or where the given model is.
        revision: of the Hub repository.
        bos: overrides the family's rule.
        terminal: overrides the family's rule.
        transform: overrides the family's, such as "sigmoid", "softmax:1", "clip:0,1".
        allow_pickle: read pickled weights where there are no safetensors.
        trust_remote_code: run code that comes with the checkpoint.
        rope_theta: overrides the config's.
        quantization: of the trunk while it loads; its head stays in full precision.
        device_map: of several devices, by the checkpoint's or its trunk's names of modules.
        sharded: the processes over which the weights of files are cut; None: this one has all.
        own_head: what reads its head, where it is in none of the family's modules.

    Raises:
        ValueError: the checkpoint does not fit its kind, or cannot be scored in packed form;
            names what was found, what was expected and what to do.
    """
    wanted = None if transform is None else parse_transform(transform)
    source = open_source(
        model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    family = choose_family(source, kind, bos=bos, terminal=terminal)
    if not family.heads:
        raise ValueError(
            f"{source.name} was given as {family.kind}, which is a pair of language models: "
            "expected a critic or reward model; load each of the pair with load_causal_lm"
        )
    if family.head_apart:
        raise ValueError(
            f"{source.name} was given as {family.kind}, whose head comes apart from the policy: "
            "expected a critic or reward model; load it with load_scorer(policy, head=...)"
        )
    how = _how_loaded(source, quantization, device_map, sharded)
    _settle_rope(source, family, rope_theta)
    head = read_head(source, family, wanted) if own_head is None else own_head(source)
    read = choose_transform(source, family, wanted, len(head.weight))
    trunk = load_trunk(source, dtype, device, how)
    return Checkpoint(
        name=source.name,
        family=family,
        transform=read,
        trunk=trunk,
        head_weight=head.weight.to(trunk.device),
        head_bias=None if head.bias is None else head.bias.to(trunk.device),
        tokenizer=load_tokenizer(source),
        record=source.record,
        head_inner=None if head.inner is None else head.inner.to(trunk.device),
    )


def load_causal_lm(
    model: ModelLike | Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    rope_theta: float | None = None,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    sharded: Shards | None = None,
) -> PreTrainedModel:
    """A language model on its own config, in eval mode: one of an implicit pair, or a reference.

    Arguments as of `load_checkpoint`. Raises ValueError: it is no causal LM, or does not load
    whole, or cannot be scored in packed form.
    """
    source = open_source(
        model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    family = choose_family(source, "implicit")
    if source.architecture and not family.takes(source.architecture):
        raise ValueError(
            f"{source.name} is a {source.architecture}: a reference or implicit reward expects a "
            f"class that ends in {' or '.join(family.architectures)}; pass a language model"
        )
    how = _how_loaded(source, quantization, device_map, sharded)
    _settle_rope(source, family, rope_theta)
    return load_language_model(source, dtype, device, how)


def load_policy_trunk(
    source: Source,
    family: Family,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    rope_theta: float | None,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """The decoder of a causal LM, on its own config, for a head that comes apart from it.

    Arguments as of `load_checkpoint`. Raises ValueError: it is no causal LM, or does not load
    whole, or cannot be scored in packed form.
    """
    if source.architecture and not family.takes(source.architecture):
        raise ValueError(
            f"{source.name} is a {source.architecture}: {family.kind} expects the policy itself, a "
            f"class that ends in {' or '.join(family.architectures)}, and its head as head="
        )
    how = _how_loaded(source, quantization, device_map)
    _settle_rope(source, family, rope_theta)
    return load_trunk(source, dtype, device, how)


def _how_loaded(
    source: Source,
    quantization: Quantization | None,
    device_map: DeviceMap | None,
    sharded: Shards | None = None,
) -> HowLoaded:
    """How its weights are to be read.

    Raises ValueError: it cannot be scored in packed form, is quantised by what is not known or
    not installed, or cannot be quantised, spread or cut as it was asked.
    """
    check_config(source.name, source.config)
    in_memory = source.instance is not None
    if source.instance is not None:
        refuse_waiting(source.instance, source.name)
    if sharded is not None and not in_memory:
        check_divides(source, sharded.ranks.world)
    if not in_memory:
        check_stored(source.name, source.config)
    if quantization is not None:
        refuse_twice(source.name, quantization, source.config, in_memory=in_memory)
    if device_map is not None and in_memory:
        raise ValueError(
            f"device_map={device_map!r} was given for {source.name}, a model in memory, whose "
            "weights have their places: expected its name or path; drop it, or load it so with "
            "transformers' from_pretrained"
        )
    return HowLoaded(quantization, device_map, sharded)


def _settle_rope(source: Source, family: Family, rope_theta: float | None) -> None:
    if source.instance is not None and rope_theta is not None:
        raise ValueError(
            f"rope_theta={rope_theta} was given for {source.name}, a model in memory, whose "
            "frequencies are computed already: expected a name or path; load it from there"
        )
    settle_rope(source.name, source.config, family, rope_theta)
