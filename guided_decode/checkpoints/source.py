"""Where a model comes from, its files or a model in memory, before any weight is read."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from guided_decode.checkpoints.adapted import Adapted, PeftModelLike
from guided_decode.checkpoints.adapter_files import (
    AdapterFiles,
    adapter_of,
    both_in_one,
    whole_model_beside,
)
from guided_decode.checkpoints.adapter_layers import (
    has_adapters,
    is_merged,
    refuse_beyond_layers,
    settled_copy,
)
from guided_decode.checkpoints.arrival import damaged
from guided_decode.checkpoints.gguf_file import gguf_config, gguf_of
from guided_decode.checkpoints.misgiven import (
    misgiven_file,
    misgiven_object,
    misgiven_repository,
)
from guided_decode.checkpoints.registry import Record, find, location_of
from guided_decode.checkpoints.weight_files import (
    WeightFiles,
    open_adapter_weights,
    open_gguf_weights,
    open_weights,
)

# Characters of another library's message.
_MOST_SAID = 400

ModelLike = str | Path | PreTrainedModel | PeftModelLike | Adapted
# The config field in which our own tools write the conventions of what they save.
METADATA_FIELD = "guided_decode"
# Modules of classes that have as many labels as their head has rows.
_HEADS = ("score", "classifier")


@dataclass(frozen=True, slots=True)
class Source:
    """A model that is to be loaded.

    name: how errors call it. architecture: its class name, "" where its config names none.
    config: a copy of its own. weights: its files; instance: the model in memory; one of the two.
    record: what the registry knows of it. base, adapter: of an adapter's files, those of the model
    that it is put on, and the adapter's own, whose weights then are `weights`. memory: what was
    given, of a model in memory, and `instance` is the same or, with adapters in it, a copy.
    """

    name: str
    architecture: str
    config: PreTrainedConfig
    record: Record | None
    weights: WeightFiles | None
    instance: PreTrainedModel | None
    trust_remote_code: bool
    base: "Source | None" = None
    adapter: AdapterFiles | None = None
    memory: "InMemory | None" = None

    @property
    def decoder_files(self) -> WeightFiles | None:
        """The files with the decoder's weights: of an adapter's its base's."""
        return self.weights if self.base is None else self.base.weights

    @property
    def is_gguf(self) -> bool:
        """Whether its trunk comes from a GGUF file."""
        files = self.decoder_files
        return files is not None and files.gguf is not None

    @property
    def own_names(self) -> frozenset[str]:
        """The names of the weights that come with it: of an adapter's files not the base's."""
        if self.weights is not None:
            return self.weights.names
        assert self.instance is not None
        return frozenset(name for name, _ in self.instance.named_parameters())

    @property
    def tensor_names(self) -> frozenset[str]:
        """The names of all weights."""
        return self.own_names if self.base is None else self.own_names | self.base.tensor_names

    def tensor(self, name: str) -> Tensor:
        """One weight, detached."""
        if self.base is not None and name not in self.own_names:
            return self.base.tensor(name)
        if self.weights is not None:
            return self.weights.read(name)
        assert self.instance is not None
        return self.instance.get_parameter(name).detach()


@dataclass(frozen=True, slots=True)
class InMemory:
    """What a caller gave. adapters: those that are to act; None: the ones that are active."""

    model: PreTrainedModel | PeftModelLike
    adapters: tuple[str, ...] | None

    @property
    def watched(self) -> PreTrainedModel:
        """The transformers model, which is the caller's own."""
        if isinstance(self.model, PreTrainedModel):
            return self.model
        inner: PreTrainedModel = self.model.get_base_model()
        return inner

    def source(self) -> Source:
        """What it is now: its weights, and the adapters in it, may have changed."""
        return _of_instance(self.model, self.adapters)


def open_source(
    model: "ModelLike | Source",
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> Source:
    """A registered name, a Hub id, a local path or a model in memory; one that is open stays so.

    A PEFT adapter, or a model with one, is the model that it makes of its base.

    Raises ValueError: nothing is found under the name, it has no config or no weights, or its
    weights are pickles that were not allowed; or it is something else than a model (a trunk head),
    or a file of it did not arrive whole, or there is no such adapter.
    """
    if isinstance(model, Source):
        return model
    given, adapters = (model.model, model.names) if isinstance(model, Adapted) else (model, None)
    if isinstance(given, PreTrainedModel | PeftModelLike):
        if gguf_file is not None:
            raise ValueError(
                f"gguf_file={gguf_file!r} came with a model in memory: expected the folder or Hub "
                "id that has the file; drop it"
            )
        return _of_instance(given, adapters)
    if not isinstance(given, str | Path):
        raise ValueError(misgiven_object(given))
    how: _How = {
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "gguf_file": gguf_file,
    }
    location = location_of(given)
    adapter = adapter_of(location, revision, adapters)
    if adapter is None:
        return _of_files(given, location, revision, **how)
    if adapter.location != location:
        # Put on the model that was given.
        return _of_adapter(adapter, _of_files(given, location, revision, **how), None, **how)
    base = _open_base(adapter, **how)
    return base if adapters == () else _of_adapter(adapter, base, find(given), **how)


class _How(TypedDict):
    allow_pickle: bool
    trust_remote_code: bool
    gguf_file: str | None


def _of_files(
    name: str | Path,
    location: str,
    revision: str | None,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
    gguf_file: str | None,
) -> Source:
    gguf = gguf_of(location, gguf_file, revision)
    if gguf is not None:
        return _of_gguf(str(name), *gguf, find(name), revision, trust_remote_code)
    if (reason := misgiven_file(location)) is not None:
        raise ValueError(reason)
    config = read_config(str(name), location, revision, trust_remote_code)
    architecture = _architecture(str(name), config)
    weights = open_weights(location, revision, allow_pickle)
    return Source(str(name), architecture, config, find(name), weights, None, trust_remote_code)


def _open_base(adapter: AdapterFiles, **how: Unpack[_How]) -> Source:
    """The model that an adapter was trained on. Raises ValueError: it is not to be had."""
    base, location = adapter.base, location_of(adapter.base)
    if Path(location).is_dir() and Path(location).samefile(adapter.location):
        raise both_in_one(adapter.name)
    try:
        return _of_files(base, location, adapter.base_revision, **how)
    except ValueError as error:
        raise ValueError(
            f"{adapter.name} is a PEFT adapter on {base}, which cannot be read here ({error}): "
            "pass the base, where it is, as the model, and this one as its adapter="
        ) from error


def _of_adapter(
    adapter: AdapterFiles, base: Source, record: Record | None, **how: Unpack[_How]
) -> Source:
    """An adapter's files on those of its base: one model, as far as anyone asks."""
    if not adapter.folder and whole_model_beside(adapter.location, adapter.revision):
        raise both_in_one(adapter.name)
    location, revision, folder = adapter.location, adapter.revision, adapter.folder
    weights = open_adapter_weights(location, revision, folder, how["allow_pickle"])
    config = base.config
    # OpenRLHF writes the config of its own class there, with its head's conventions.
    if not folder and (Path(location) / "config.json").is_file():
        config = read_config(location, location, revision, how["trust_remote_code"])
    if not _are_of_adapter(config):
        _forget_conventions(config)
    _settle_labels(config, weights)
    return Source(
        name=adapter.name,
        architecture=adapter.architecture(config) or base.architecture,
        config=config,
        record=record,
        weights=weights,
        instance=None,
        trust_remote_code=how["trust_remote_code"],
        base=base,
        adapter=adapter,
    )


def _of_gguf(
    name: str,
    location: str,
    file: str,
    record: Record | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Source:
    weights = open_gguf_weights(location, file, revision)
    assert weights.gguf is not None
    config = gguf_config(name, location, weights.gguf, revision, trust_remote_code)
    architecture = _architecture(name, config)
    return Source(name, architecture, config, record, weights, None, trust_remote_code)


def read_config(
    name: str, location: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """The config at a folder or Hub id. Raises ValueError: none is there, or it cannot be read."""
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


def _settle_labels(config: PreTrainedConfig, weights: WeightFiles) -> None:
    """The number of labels is in no adapter's config: it is the number of rows of its head."""
    head = next((f"{each}.weight" for each in _HEADS if f"{each}.weight" in weights.names), None)
    if head is not None:
        config.num_labels = len(weights.read(head))


def _of_instance(
    given: PreTrainedModel | PeftModelLike, adapters: tuple[str, ...] | None
) -> Source:
    memory = InMemory(given, adapters)
    model, name = memory.watched, memory.watched.config.name_or_path
    called = name or type(model).__name__
    if not isinstance(given, PreTrainedModel):
        for each, config in given.peft_config.items():
            if config.is_prompt_learning and (adapters is None or each in adapters):
                refuse_beyond_layers(called, config)
    adapted = is_merged(model)
    if adapters or has_adapters(model):
        model = settled_copy(model, adapters, called)
        adapted = adapted or has_adapters(model)
    config = copy.deepcopy(model.config)
    if adapted:
        _forget_conventions(config)
    return Source(
        name=f"{called} with {', '.join(adapters)}" if adapters else called,
        architecture=type(model).__name__,
        config=config,
        record=None if adapted or not name else find(name),
        weights=None,
        instance=model,
        trust_remote_code=True,
        memory=memory,
    )


def _are_of_adapter(config: PreTrainedConfig) -> bool:
    """Whether our own tools wrote the conventions in a config for an adapter, and not its base."""
    metadata = getattr(config, METADATA_FIELD, None)
    return isinstance(metadata, dict) and metadata.get("adapter") is True


def _forget_conventions(config: PreTrainedConfig) -> None:
    """Whoever trained an adapter had other conventions, maybe, than whoever trained its base."""
    if hasattr(config, METADATA_FIELD):
        delattr(config, METADATA_FIELD)
