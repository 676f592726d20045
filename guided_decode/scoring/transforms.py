"""Value transforms: from a head's output to the value that guidance uses."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


class Transform(Protocol):
    """A frozen record; `str` gives the text that `parse_transform` reads."""

    def __call__(self, head_output: Tensor) -> Tensor:
        """head_output: [n, labels], any float. Returns float32 [n]."""
        ...

    def fits(self, labels: int) -> bool:
        """Whether a head with that many labels can be read."""
        ...


class _OneLabel:
    """Reads a head with one label."""

    __slots__ = ()

    def fits(self, labels: int) -> bool:
        return labels == 1


@dataclass(frozen=True, slots=True)
class Identity(_OneLabel):
    """The head's output as it is."""

    def __call__(self, head_output: Tensor) -> Tensor:
        return head_output.float()[:, 0]

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True, slots=True)
class Sigmoid(_OneLabel):
    """The probability of one label."""

    def __call__(self, head_output: Tensor) -> Tensor:
        return torch.sigmoid(head_output.float()[:, 0])

    def __str__(self) -> str:
        return "sigmoid"


@dataclass(frozen=True, slots=True)
class LogSigmoid(_OneLabel):
    """The log-probability of one label."""

    def __call__(self, head_output: Tensor) -> Tensor:
        return F.logsigmoid(head_output.float()[:, 0])

    def __str__(self) -> str:
        return "log-sigmoid"


@dataclass(frozen=True, slots=True)
class SoftmaxClass:
    """The probability of class `index` among all labels."""

    index: int

    def __post_init__(self) -> None:
        if not (self.index >= 0 and float(self.index).is_integer()):
            raise ValueError(f"softmax:{self.index}: expected a class index of at least 0")
        object.__setattr__(self, "index", int(self.index))

    def __call__(self, head_output: Tensor) -> Tensor:
        return head_output.float().softmax(-1)[:, self.index]

    def fits(self, labels: int) -> bool:
        return labels > max(1, self.index)

    def __str__(self) -> str:
        return f"softmax:{self.index}"


@dataclass(frozen=True, slots=True)
class Clip(_OneLabel):
    """The head's output, held between `low` and `high` (RAD: 0 and 1)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"clip:{self.low:g},{self.high:g}: expected low below high")

    def __call__(self, head_output: Tensor) -> Tensor:
        return head_output.float()[:, 0].clamp(self.low, self.high)

    def __str__(self) -> str:
        return f"clip:{self.low!r},{self.high!r}"


@dataclass(frozen=True, slots=True)
class Normalise(_OneLabel):
    """(output − mean) / std, as OpenRLHF's critics do under `normalize_reward`."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"normalise:{self.mean:g},{self.std:g}: expected a std above 0")

    def __call__(self, head_output: Tensor) -> Tensor:
        return (head_output.float()[:, 0] - self.mean) / self.std

    def __str__(self) -> str:
        return f"normalise:{self.mean!r},{self.std!r}"


AnyTransform = Identity | Sigmoid | LogSigmoid | SoftmaxClass | Clip | Normalise

_BY_NAME: dict[str, Callable[..., AnyTransform]] = {
    "identity": Identity,
    "sigmoid": Sigmoid,
    "log-sigmoid": LogSigmoid,
    "softmax": SoftmaxClass,
    "clip": Clip,
    "normalise": Normalise,
}
_FORMS = "identity, sigmoid, log-sigmoid, softmax:CLASS, clip:LOW,HIGH, normalise:MEAN,STD"
assert len(_BY_NAME) == len(get_args(AnyTransform))


def parse_transform(given: str | Transform) -> Transform:
    """The transform of a text such as "sigmoid", "softmax:1" or "clip:0,1".

    Raises ValueError: it is none of the forms; a transform is handed back as it is.
    """
    if not isinstance(given, str):
        if not callable(given) or not callable(getattr(given, "fits", None)):
            raise ValueError(
                f"a transform came as {type(given).__name__}: expected the text of one ({_FORMS}), "
                "or a record of guided_decode.scoring.transforms"
            )
        return given
    name, _, text = given.partition(":")
    record = _BY_NAME.get(name)
    if record is None:
        raise ValueError(f"transform {given!r}: expected one of {_FORMS}")
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"transform {given!r}: {text!r} is not numbers; forms: {_FORMS}") from None
    wanted = len(fields(record))  # type: ignore[arg-type]
    if len(numbers) != wanted:
        raise ValueError(
            f"transform {given!r}: {name} takes {wanted} numbers, got {len(numbers)}; "
            f"forms: {_FORMS}"
        )
    return record(*numbers)
