"""The head of a critic: where it is, and whether it is what its family expects."""

from dataclasses import dataclass

from torch import Tensor

from guided_decode.checkpoints.families import FAMILIES, Family
from guided_decode.checkpoints.source import Source
from guided_decode.scoring.transforms import Normalise, Transform

_CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification")


@dataclass(frozen=True, slots=True)
class Head:
    """weight: float32 [labels, hidden]. bias: float32 [labels], or None."""

    weight: Tensor
    bias: Tensor | None


def head_module(source: Source, family: Family) -> str | None:
    """The module that holds the head; None where the checkpoint has none of the family's."""
    named = getattr(source.config, family.head_field, None) if family.head_field else None
    places = (*((str(named),) if named else ()), *family.heads)
    names = source.tensor_names
    return next((place for place in places if f"{place}.weight" in names), None)


def read_head(source: Source, family: Family) -> Head:
    """The head, checked.

    Raises ValueError: the checkpoint is of another class, has no such head, another number of
    labels or another width, or a bias that the family's trainer does not have.
    """
    if source.architecture and not family.takes(source.architecture):
        raise ValueError(
            f"{source.name} is a {source.architecture}: {family.kind} expects a class that ends in "
            f"{' or '.join(family.architectures)}; {_what_to_pass(source)}"
        )
    module = head_module(source, family)
    if module is None:
        wanted = ", ".join(f"{place}.weight" for place in family.heads)
        raise ValueError(
            f"{source.name} has no head that {family.kind} expects (one of {wanted}): a critic "
            f"without its head scores at random; {_what_to_pass(source)}"
        )
    weight = source.tensor(f"{module}.weight").float()
    _check_shape(source, family, module, weight)
    return Head(weight, _read_bias(source, family, module))


def _what_to_pass(source: Source) -> str:
    kinds = possible_kinds(source)
    return f"pass kind={' or '.join(kinds)}" if kinds else "pass another checkpoint"


def possible_kinds(source: Source) -> list[str]:
    """The kinds that the checkpoint could be, by its class and its head."""
    return [family.kind for family in FAMILIES.values() if _could_be(source, family)]


def _could_be(source: Source, family: Family) -> bool:
    if source.architecture and not family.takes(source.architecture):
        return False
    if not family.heads:
        return "lm_head.weight" in source.tensor_names or bool(source.architecture)
    module = head_module(source, family)
    return module is not None and len(source.tensor(f"{module}.weight")) in family.labels


def _check_shape(source: Source, family: Family, module: str, weight: Tensor) -> None:
    labels, hidden = weight.shape[0], source.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] != hidden:
        raise ValueError(
            f"{source.name} has {module}.weight of shape {list(weight.shape)}: expected "
            f"[labels, {hidden}], the trunk's hidden size; the two do not belong together"
        )
    if labels not in family.labels:
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
    if family.bias_must_be_zero:
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
