"""A model with a certain adapter: how one says which, wherever a model is taken."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel


@runtime_checkable
class PeftModelLike(Protocol):
    """What a PeftModel is, where PEFT may not be installed."""

    peft_config: Any

    def get_base_model(self) -> Any:
        """The model that it was put around, with the adapters in its layers."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model with one of its PEFT adapters, whichever of them is active now.

    `load_scorer` takes one wherever it takes a model: several on one model in memory share its
    weights, and each keeps to its own adapter while others are switched on and off.

    model: a PeftModel, or a transformers model with adapters in its layers; or a name or folder.
    adapter: in memory an adapter's name, or several that act together. For files a folder or Hub id
        with an adapter_config.json that is put on the model, or where the model is such a folder
        itself, a folder in it. None or an empty list: without any, the base alone.
    """

    model: "str | Path | PreTrainedModel | PeftModelLike"
    adapter: str | Path | Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = self.adapter
        several = isinstance(given, Sequence) and all(isinstance(name, str) for name in given)
        if not (several or given is None or isinstance(given, Path)):
            raise ValueError(
                f"adapter={self.adapter!r}: expected the name of an adapter, a folder, a list of "
                "names, or None (the base alone)"
            )
        if isinstance(self.model, Adapted):
            raise ValueError("an Adapted was given as the model of another: expected the model")

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that act together; empty for the base alone."""
        if self.adapter is None:
            return ()
        return (str(self.adapter),) if isinstance(self.adapter, str | Path) else (*self.adapter,)


def is_in_memory(model: object) -> bool:
    """Whether what was given as a model is one, and not the name of one."""
    given = model.model if isinstance(model, Adapted) else model
    return isinstance(given, PreTrainedModel | PeftModelLike)
