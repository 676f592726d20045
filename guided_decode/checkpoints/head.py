"""The head of a critic: where it is, and whether it is what its family expects."""

from dataclasses import dataclass

from torch import Tensor

from guided_decode.checkpoints.families import FAMILIES, Family
from guided_decode.checkpoints.misgiven import adapter_layers
from guided_decode.checkpoints.quantised_layers import is_plain
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.weight_files import HEADS_BESIDE, pickled_head
from guided_decode.scoring.transforms import Normalise, Transform
from guided_decode.scoring.trunk_head import InnerLayer

# Of a list of a linear layer, an activation and a linear layer.
_FIRST, _LAST = ".0", ".2"
_CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification")


@dataclass(frozen=True, slots=True)
class Head:
    """weight: float32 [labels, hidden]. bias: float32 [labels], or None.

    inner: the first of two layers, as wide as the hidden states.
    """

    weight: Tensor
    bias: Tensor | None
    inner: InnerLayer | None = None


def head_module(source: Source, family: Family) -> str | None:
    """The module that holds the head; None where the checkpoint has none of the family's.

    Of two layers with an activation between them, which are numbers 0 and 2 of a list, the last.
    """
    named = getattr(source.config, family.head_field, None) if family.head_field else None
    places = (*((str(named),) if named else ()), *family.heads)
    # An adapter's own head comes before one that its base has.
    for names in (source.own_names, source.tensor_names):
        for place in places:
            if f"{place}.weight" in names:
                return place
            if family.inner_activation and _both(place) <= names:
                return f"{place}{_LAST}"
    return None


def _both(place: str) -> set[str]:
    return {f"{place}{_FIRST}.weight", f"{place}{_LAST}.weight"}


def read_head(source: Source, family: Family, transform: Transform | None = None) -> Head:
    """The head, checked.

    Args:
        transform: what the caller gave to read it, who then answers for the number of labels.

    Raises ValueError: the checkpoint is of another class, has no such head, another number of
    labels or another width, numbers that are none, or a bias that the family's trainer does not
    have.
    """
    if source.architecture and not family.takes(source.architecture):
        raise ValueError(
            f"{source.name} is a {source.architecture}: {family.kind} expects a class that ends in "
            f"{' or '.join(family.architectures)}; {_what_to_pass(source)}"
        )
    module = head_module(source, family)
    if module is None:
        _refuse_quantised(source, family)
        wanted = ", ".join(f"{place}.weight" for place in family.heads)
        raise ValueError(
            f"{source.name} has no head that {family.kind} expects (one of {wanted}): a critic "
            f"without its head scores at random; {_where_else(source, family)}"
        )
    stored = source.tensor(f"{module}.weight")
    if not is_plain(stored):
        kind = type(stored).__name__ if type(stored) is not Tensor else str(stored.dtype)[6:]
        raise _quantised(source, module, kind)
    weight = stored.float()
    inner = _read_inner(source, family, module)
    _check_shape(source, family, module, weight, transform)
    head = Head(weight, _read_bias(source, family, module), inner)
    _check_finite(source, module, head.weight, head.bias)
    return head


def read_token_head(source: Source, rows: list[int], family: Family) -> Head:
    """Rows of the language-model head as a head: the logits of some tokens.

    rows: token ids. Raises ValueError: it has no such head, or not in full precision.
    """
    names = source.tensor_names
    tables = [
        name for name in sorted(names) if name.endswith(("lm_head.weight", "embed_tokens.weight"))
    ]
    # A head of its own comes before the table that it would be tied to.
    name = next(iter(sorted(tables, key=lambda each: "lm_head" not in each)), None)
    if name is None or not source.architecture.endswith(("ForCausalLM", "LMHeadModel", "")):
        raise ValueError(
            f"{source.name} is a {source.architecture} without a language-model head: these steps "
            f"of {family.kind} are read off the logits of two tokens; pass another steps="
        )
    table = source.tensor(name)
    if not is_plain(table):
        raise _quantised(source, name.removesuffix(".weight"), type(table).__name__)
    weight = table[rows].float()
    _check_finite(source, name.removesuffix(".weight"), weight, None)
    return Head(weight, None)


def _read_inner(source: Source, family: Family, module: str) -> InnerLayer | None:
    """The first layer of a head with two. Raises ValueError: its shape is not the trunk's."""
    if not (family.inner_activation and module.endswith(_LAST)):
        return None
    first = f"{module.removesuffix(_LAST)}{_FIRST}"
    weight = source.tensor(f"{first}.weight")
    if not is_plain(weight):
        raise _quantised(source, first, str(weight.dtype)[6:])
    hidden = source.config.hidden_size
    if weight.ndim != 2 or tuple(weight.shape) != (hidden, hidden):
        raise ValueError(
            f"{source.name} has {first}.weight of shape {list(weight.shape)}: expected "
            f"[{hidden}, {hidden}], the trunk's hidden size; the two do not belong together"
        )
    bias = f"{first}.bias"
    read = source.tensor(bias).float() if bias in source.tensor_names else None
    _check_finite(source, first, weight, read)
    return InnerLayer(weight.float(), read, family.inner_activation)


def _check_finite(source: Source, module: str, weight: Tensor, bias: Tensor | None) -> None:
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{source.name} has NaN or infinity in {module}.{part}: expected numbers; save or "
                "download the checkpoint again"
            )


def _refuse_quantised(source: Source, family: Family) -> None:
    """Raises ValueError: of the head there are packed weights only."""
    for module in family.heads:
        starts = (f"{module}.weight_", f"{module}._weight", f"{module}.q")
        packed = sorted(name for name in source.tensor_names if name.startswith(starts))
        if packed:
            raise _quantised(source, module, packed[0])


def _quantised(source: Source, module: str, what: str) -> ValueError:
    where = (
        f"its name or path, or load it with [{module!r}] as llm_int8_skip_modules or "
        "modules_to_not_convert of its quantization config"
        if source.instance is not None
        else "a checkpoint that was saved so"
    )
    return ValueError(
        f"{source.name} has its head {module} quantised ({what}): expected full precision, since "
        f"every value is read off it; pass {where}"
    )


def _where_else(source: Source, family: Family) -> str:
    """Where the head may be instead, or what to pass."""
    if source.is_gguf:
        return (
            "a GGUF file has a trunk only: pass head=, the checkpoint that it was converted from "
            "or a safetensors file with its head"
        )
    if source.instance is not None and (layer := adapter_layers(source.instance)) is not None:
        return (
            f"PEFT has wrapped its layers ({layer}): pass merge_and_unload() of the PEFT model, "
            "which puts the trained head in its place"
        )
    pickle = None if source.weights is None else pickled_head(source.weights)
    if pickle is not None and family.head_field:
        return (
            f"{pickle} beside it, a pickle, may have it: pass allow_pickle=True if you trust its "
            "author"
        )
    return _what_to_pass(source)


def _what_to_pass(source: Source) -> str:
    kinds = possible_kinds(source)
    if kinds:
        return f"pass kind={' or '.join(kinds)}"
    kind = _by_transform(source)
    return "pass another checkpoint" if kind is None else f"pass kind={kind}"


def possible_kinds(source: Source) -> list[str]:
    """The kinds that the checkpoint could be, by its class and its head."""
    return [family.kind for family in FAMILIES.values() if _could_be(source, family)]


def what_it_could_be(source: Source) -> str:
    """The same as a sentence's part, with the file of a head that lies beside the weights."""
    kinds = possible_kinds(source)
    if not kinds:
        return _by_transform(source) or "none of the kinds of this version"
    beside = _head_beside(source)
    return ", ".join(kinds) + (f" (its head lies in {beside})" if beside else "")


def _by_transform(source: Source) -> str | None:
    """The kind that reads a head of several classes, a process reward model's, say."""
    for family in FAMILIES.values():
        module = head_module(source, family) if family.takes(source.architecture) else None
        labels = 0 if module is None else len(source.tensor(f"{module}.weight"))
        if len(family.labels) > 1 and labels > 1 and labels not in family.labels:
            return (
                f'{family.kind} with transform="softmax:CLASS", CLASS being the good one of its '
                f"{labels} labels"
            )
    return None


def _head_beside(source: Source) -> str | None:
    if source.weights is None:
        return None
    files = {stored.file for stored in source.weights.tensors.values()}
    return next((file for file in HEADS_BESIDE if file in files), None)


def _could_be(source: Source, family: Family) -> bool:
    if source.architecture and not family.takes(source.architecture):
        return False
    if not family.heads:
        return "lm_head.weight" in source.tensor_names or bool(source.architecture)
    module = head_module(source, family)
    labels = 0 if module is None else len(source.tensor(f"{module}.weight"))
    # Labels at steps look like labels at tokens: only a class that says so is evidence.
    named = not family.by_steps or source.architecture.endswith(family.evidence)
    return named and labels in family.labels


def _check_shape(
    source: Source, family: Family, module: str, weight: Tensor, transform: Transform | None
) -> None:
    labels, hidden = weight.shape[0], source.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] != hidden:
        raise ValueError(
            f"{source.name} has {module}.weight of shape {list(weight.shape)}: expected "
            f"[labels, {hidden}], the trunk's hidden size; the two do not belong together"
        )
    if labels not in family.labels and (transform is None or not transform.fits(labels)):
        raise ValueError(
            f"{source.name} has num_labels {labels}: {family.kind} expects "
            f"{' or '.join(map(str, family.labels))}; {_what_to_pass(source)}"
        )
    declared = source.config.num_labels
    if source.architecture.endswith(_CLASSIFIERS) and declared != labels:
        raise ValueError(
            f"{source.name} has num_labels {declared} in its config and {labels} in "
            f"{module}.weight: expected the same; mend its config"
        )


def _read_bias(source: Source, family: Family, module: str) -> Tensor | None:
    if f"{module}.bias" not in source.tensor_names:
        return None
    bias = source.tensor(f"{module}.bias").float()
    if module in family.biasless:
        if bias.any():
            raise ValueError(
                f"{source.name} has {module}.bias {bias.tolist()}: {family.kind} expects zero, "
                "because its trainer's head has no bias; save the checkpoint without it, or pass "
                "the kind whose trainer has one"
            )
        return None
    return bias


def choose_transform(
    source: Source, family: Family, given: Transform | None, labels: int
) -> Transform:
    """The transform that was given, else the family's, with the config's normalisation.

    Raises ValueError: the given transform cannot read a head with that many labels.
    """
    if given is not None:
        if not given.fits(labels):
            raise ValueError(
                f"transform {given} cannot read the {labels} labels of {source.name}: expected "
                f"{family.transform_of(labels)} or another that can"
            )
        return given
    if family.normalise_field and getattr(source.config, family.normalise_field, False):
        mean, std = getattr(source.config, "mean", 0.0), getattr(source.config, "std", 1.0)
        return Normalise(float(mean), float(std))
    return family.transform_of(labels)
