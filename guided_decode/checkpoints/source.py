"""Where a model comes from, its files or a model in memory, before any weight is read."""

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from guided_decode.checkpoints.arrival import damaged
from guided_decode.checkpoints.misgiven import (
    misgiven_file,
    misgiven_object,
    misgiven_repository,
)
from guided_decode.checkpoints.registry import Record, find
from guided_decode.checkpoints.weight_files import WeightFiles, open_weights

# Characters of another library's message.
_MOST_SAID = 400

ModelLike = str | Path | PreTrainedModel


@dataclass(frozen=True, slots=True)
class Source:
    """A model that is to be loaded.

    name: how errors call it. architecture: its class name, "" where its config names none.
    config: a copy of its own. weights: its files; instance: the model in memory; one of the two.
    record: what the registry knows of it.
    """

    name: str
    architecture: str
    config: PreTrainedConfig
    record: Record | None
    weights: WeightFiles | None
    instance: PreTrainedModel | None
    trust_remote_code: bool

    @property
    def tensor_names(self) -> frozenset[str]:
        """The names of all weights."""
        if self.weights is not None:
            return self.weights.names
        assert self.instance is not None
        return frozenset(name for name, _ in self.instance.named_parameters())

    def tensor(self, name: str) -> Tensor:
        """One weight, detached."""
        if self.weights is not None:
            return self.weights.read(name)
        assert self.instance is not None
        return self.instance.get_parameter(name).detach()


def open_source(
    model: ModelLike,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """A registered name, a Hub id, a local path or a model in memory.

    Raises ValueError: nothing is found under the name, it has no config or no weights, or its
    weights are pickles that were not allowed; or it is something else than a model (an adapter, a
    trunk head, a GGUF file), or a file of it did not arrive whole.
    """
    if isinstance(model, PreTrainedModel):
        return _of_instance(model)
    if not isinstance(model, str | Path):
        raise ValueError(misgiven_object(model))
    record = find(model)
    location = str(model) if record is None or Path(model).is_dir() else record.location
    if (reason := misgiven_file(location)) is not None:
        raise ValueError(reason)
    config = _read_config(str(model), location, revision, trust_remote_code)
    architecture = _architecture(str(model), config)
    weights = open_weights(location, revision, allow_pickle)
    return Source(str(model), architecture, config, record, weights, None, trust_remote_code)


def _read_config(
    name: str, location: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
    except ImportError:
        raise
    # Config classes run code of their own on what the file says, which raises what comes.
    except Exception as error:
        raise _unreadable_config(name, location, revision, error) from error
    return config


def _unreadable_config(
    name: str, location: str, revision: str | None, error: Exception
) -> ValueError:
    said = " ".join(str(error).split()) or type(error).__name__
    path = Path(location) / "config.json"
    if path.is_file():
        return damaged(Path(location), (".json",)) or ValueError(
            f"{path} cannot be read as a model's config: {said[:_MOST_SAID]}; expected what "
            "save_pretrained writes; mend it or download it again"
        )
    other = None if Path(location).is_dir() else misgiven_repository(location, revision)
    return ValueError(
        other
        or f"{name}: expected a folder with a config.json, a registered name or a Hub id; "
        f"{said[:_MOST_SAID]}"
    )


def _architecture(name: str, config: PreTrainedConfig) -> str:
    """The class that a config names, "" where it names none."""
    named = config.architectures or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(
            f"{name} has architectures {named!r} in its config.json: expected a list with the name "
            "of its class; mend it"
        )
    return named[0]


def _of_instance(model: PreTrainedModel) -> Source:
    name = model.config.name_or_path
    return Source(
        name=name or type(model).__name__,
        architecture=type(model).__name__,
        config=copy.deepcopy(model.config),
        record=find(name) if name else None,
        weights=None,
        instance=model,
        trust_remote_code=True,
    )
