"""Folders and repositories that PEFT wrote: which adapters there are, and on what base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import cached_file

from guided_decode.checkpoints.arrival import unreadable

ADAPTER_CONFIG = "adapter_config.json"
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
# The name that PEFT gives where none is given, whose files stand in the folder itself.
DEFAULT_ADAPTER = "default"
_CLASSES = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter, unread.

    location: a folder or a Hub id. revision: of the repository. folder: where in it, "" or a path
    that ends in a slash. settings: its adapter_config.json.
    """

    location: str
    revision: str | None
    folder: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.location}/{self.folder}".rstrip("/") if self.folder else self.location

    @property
    def base(self) -> str:
        """The model that it was trained on. Raises ValueError: it names none."""
        base = self.settings.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError(
                f"{self.name} is a PEFT adapter whose {ADAPTER_CONFIG} names no base model "
                "(base_model_name_or_path): pass the base as the model and this one as its "
                f"adapter, load_scorer(BASE, adapter={self.name!r})"
            )
        return base

    @property
    def base_revision(self) -> str | None:
        """Of the base's repository."""
        given = self.settings.get("revision")
        return given if isinstance(given, str) and given else None

    def architecture(self, config: PreTrainedConfig) -> str:
        """The class that was adapted; "" where nothing says."""
        task = self.settings.get("task_type")
        if task in _CLASSES:
            return str(_CLASSES[task].get(config.model_type, ""))
        own = self.settings.get("auto_mapping")
        return str(own.get("base_model_class") or "") if isinstance(own, dict) else ""


def adapter_of(
    location: str, revision: str | None, adapters: tuple[str, ...] | None
) -> AdapterFiles | None:
    """The adapter at a location, or the one that was asked for on the model there.

    Raises ValueError: there is none of that name.
    """
    if adapters is not None and len(adapters) > 1:
        raise ValueError(
            f"{location} was given with {len(adapters)} adapters, {', '.join(adapters)}: expected "
            "one for a model in files; combine them with add_weighted_adapter() of peft"
        )
    wanted = adapters[0] if adapters else None
    if wanted is not None and not Path(wanted).is_absolute():
        found = find_adapter(location, revision, wanted)
    else:
        found = find_adapter(location, revision, None)
        if found is not None and wanted is not None:
            raise ValueError(
                f"{location} is a PEFT adapter itself, and was given with another one, {wanted}: "
                "expected the base of both as the model"
            )
    if found is not None or wanted is None:
        return found
    found = find_adapter(wanted, None, None)
    if found is None:
        raise ValueError(
            f"adapter={wanted!r}: {location} has no such adapter in it, and it is no folder or Hub "
            f"id of one (with an {ADAPTER_CONFIG}); expected either"
        )
    return found


def find_adapter(location: str, revision: str | None, wanted: str | None) -> AdapterFiles | None:
    """The adapter in a folder or repository; None where it holds none.

    Args:
        location: a folder or Hub id.
        revision: of the repository.
        wanted: its name, where there are several; None: the only one, or the one that has none.

    Raises ValueError: several, or none of that name, or a config that cannot be read.
    """
    at_root = _config_file(location, revision, "")
    if at_root is not None and wanted in (None, DEFAULT_ADAPTER):
        return AdapterFiles(location, revision, "", _read(at_root))
    known = _in_folder(location) if at_root or not _is_whole(location) else []
    if wanted is None and len(known) == 1:
        wanted = known[0]
    if wanted is not None:
        found = None
        if _is_part(location, wanted):
            found = _config_file(location, revision, f"{wanted}/")
        if found is not None:
            return AdapterFiles(location, revision, f"{wanted}/", _read(found))
        if not known and at_root is None:
            return None
        names = [*([DEFAULT_ADAPTER] if at_root else []), *known]
        raise ValueError(
            f"{location} has no adapter {wanted!r}: expected {' or '.join(names)}; to put another "
            "adapter on its base pass the base as the model"
        )
    if known:
        raise ValueError(
            f"{location} has {len(known)} adapters, {', '.join(known)}: pass adapter= with the one "
            "that is wanted"
        )
    return None


def _is_part(location: str, wanted: str) -> bool:
    """Whether an adapter's name can be that of a folder in a location."""
    return (Path(location).is_dir() and not Path(wanted).is_absolute()) or "/" not in wanted


def _is_whole(location: str) -> bool:
    return (Path(location) / "config.json").is_file()


def whole_model_beside(location: str, revision: str | None) -> bool:
    """Whether an adapter's folder or repository holds a whole model as well."""
    if Path(location).is_dir():
        return _is_whole(location) and any((Path(location) / each).is_file() for each in _WHOLE)
    try:
        return any(file_exists(location, each, revision=revision) for each in _WHOLE)
    # Nobody can be asked: what is on this machine was looked for before.
    except (OSError, ValueError, RuntimeError):
        return False


def base_of(location: str) -> str | None:
    """The model that the adapter in a folder was trained on; None where it names none."""
    found = _config_file(location, None, "")
    base = None if found is None else _read(found).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def both_in_one(name: str) -> ValueError:
    """The error of a folder in which nothing tells which of two models is meant."""
    return ValueError(
        f"{name} is a PEFT adapter ({ADAPTER_CONFIG}) with a whole model (config.json and weights) "
        "beside it, so that nothing tells which of the two is meant: move one of them to a folder "
        "of its own"
    )


def _in_folder(location: str) -> list[str]:
    """The adapters that have folders of their own, as PEFT saves several; of a repository none."""
    folder = Path(location)
    if not folder.is_dir():
        return []
    return sorted(each.parent.name for each in folder.glob(f"*/{ADAPTER_CONFIG}"))


def _config_file(location: str, revision: str | None, folder: str) -> Path | None:
    """The config of an adapter; None where there is none, or no such repository."""
    if Path(location).is_dir():
        path = Path(location) / folder / ADAPTER_CONFIG
        return path if path.is_file() else None
    try:
        found = cached_file(
            location,
            folder + ADAPTER_CONFIG,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise unreadable(path, "an adapter's config in JSON", error) from error
    if not isinstance(settings, dict):
        raise unreadable(path, "an adapter's config in JSON", "no object")
    return settings
