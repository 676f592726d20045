"""What is given as a model and is none: adapters, trunk heads, wrapped models."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from guided_decode.scoring.trunk_head import FILE_NAME, KIND

_ADAPTER = "adapter_config.json"
_MERGE = (
    "merge it (merged = model.merge_and_unload() of peft, then merged.save_pretrained(FOLDER)) and "
    "pass what comes out"
)


def misgiven_file(path: str | Path) -> str | None:
    """Why a path cannot be a model, with what to do, where that shows in its name; else None."""
    if str(path).startswith(("http://", "https://")):
        return (
            f"{path} is a URL: a scorer server is tcp://HOST:PORT; what a pooling server has is a "
            "judge of searches, guided_decode.search.connect_judge"
        )
    path = Path(path)
    if path.is_file():
        return _single_file(path)
    if path.is_dir() and (path / _ADAPTER).is_file():
        # That of a base: others are read.
        return _adapter(str(path))
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / FILE_NAME).is_file():
            return _trunk_head(str(path))
        if found := sorted(each.name for each in path.glob("*.gguf")):
            return (
                f"{path} has no config.json but {', '.join(found)}: pass gguf_file="
                f"{found[0]!r}, or the path of a GGUF file"
            )
    return None


def misgiven_repository(location: str, revision: str | None) -> str | None:
    """The same of a Hub repository, whose files have to be asked for: after its config failed."""
    for file, say in ((_ADAPTER, _adapter), (FILE_NAME, _trunk_head)):
        try:
            found = cached_file(
                location, file, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, ValueError):
            return None
        if found is not None:
            return say(location)
    return None


def misgiven_object(given: object) -> str:
    """Why an object is no model, with what to do."""
    kind = type(given).__name__
    if hasattr(given, "peft_config"):
        return (
            f"a {kind} was given as a model, which is a PEFT adapter around one: pass "
            "model.merge_and_unload()"
        )
    if isinstance(given, nn.Module) and hasattr(given, "pretrained_model"):
        return (
            f"a {kind} was given as a model, which is a transformers model in a wrapper: save it "
            'with save_pretrained and pass the folder with kind="value-head"'
        )
    return (
        f"a {kind} was given as a model: expected a name, a path or a transformers PreTrainedModel"
    )


def adapter_layers(model: PreTrainedModel) -> str | None:
    """The class of a layer that PEFT put into a model in memory, where there is one."""
    return next(
        (type(each).__name__ for each in model.modules() if type(each).__module__[:5] == "peft."),
        None,
    )


def _single_file(path: Path) -> str:
    if path.name == FILE_NAME:
        return _trunk_head(str(path))
    return f"{path} is a file: expected the folder of a checkpoint, with its config.json"


def _adapter(name: str) -> str:
    return f"{name} is a PEFT adapter ({_ADAPTER}) on the weights of a base model: {_MERGE}"


def _trunk_head(name: str) -> str:
    return (
        f"{name} is a head on the policy's own trunk ({KIND}), no model: pass the policy as the "
        f"model and this as its head, load_scorer(POLICY, head={name!r})"
    )
