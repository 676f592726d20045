"""The tokenizer that comes with a checkpoint, by path or of a model in memory."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from guided_decode.checkpoints.adapter_files import adapter_of
from guided_decode.checkpoints.arrival import damaged
from guided_decode.checkpoints.gguf_file import GgufFile, gguf_of
from guided_decode.checkpoints.registry import location_of
from guided_decode.checkpoints.source import Source

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the checkpoint; None where it has none.

    A model in memory has that of the folder or repository that it was loaded from, as far as it
    is on this machine.

    Raises ValueError: a file of it did not arrive whole, or is none of a tokenizer.
    """
    if source.weights is not None:
        weights, trusted = source.weights, source.trust_remote_code
        found = _read(weights.location, weights.revision, trusted, False)
        if found is None and weights.gguf is not None and weights.gguf.has_tokenizer:
            inside = _load(
                weights.location, weights.revision, trust_remote_code=trusted, local=False,
                gguf_file=weights.gguf.path.name,
            )  # fmt: skip
            return _with_special_tokens(inside, weights.gguf)
        # A trainer saves an adapter's tokenizer beside it, or leaves it with the base.
        return found if found is not None or source.base is None else load_tokenizer(source.base)
    name = source.config.name_or_path
    return _read(str(name), None, False, True) if name else None


def _with_special_tokens(
    tokenizer: PreTrainedTokenizerBase, file: GgufFile
) -> PreTrainedTokenizerBase:
    """The tokenizer with the BOS and EOS of the file's header: transformers 5.16 confuses them."""
    for name in ("bos", "eos"):
        token_id = file.fields.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and getattr(tokenizer, f"{name}_token_id") != token_id:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(token_id)))
    return tokenizer


def tokenizer_place(
    location: str, revision: str | None, gguf_file: str | None = None
) -> tuple[str, dict[str, str]]:
    """What `AutoTokenizer.from_pretrained` takes of a checkpoint, and what more by name.

    The tokenizer's files win over a GGUF file that they lie beside.
    """
    gguf = gguf_of(location, gguf_file, revision)
    if gguf is None:
        return location, {}
    folder, file = gguf
    beside = any(_has(folder, name, revision, False) for name in _FILES)
    return folder, {} if beside else {"gguf_file": file}


def read_policy_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a path or Hub id. Raises ValueError: there is none, or it is broken."""
    home, revision = tokenizer_home(location)
    return _load(home, revision, trust_remote_code=False, local=False)


def tokenizer_home(
    location: str, revision: str | None = None, adapter: str | None = None
) -> tuple[str, str | None]:
    """Where a model's tokenizer lies, and its revision: that of an adapter may be its base's.

    Args:
        location: a folder or Hub id.
        revision: of the repository.
        adapter: the adapter that is wanted of it or on it.
    """
    files = adapter_of(location, revision, None if adapter is None else (adapter,))
    on_top = files is None or files.location != location
    if files is None or on_top or any(_has(location, name, revision, False) for name in _FILES):
        return location, revision
    return location_of(files.base), files.base_revision


def tokenizer_beside(
    location: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a path or Hub id; None where it has none. Raises ValueError: broken."""
    return _read(location, revision, trust_remote_code, False)


def _read(
    location: str, revision: str | None, trust_remote_code: bool, local: bool
) -> PreTrainedTokenizerBase | None:
    if not any(_has(location, name, revision, local) for name in _FILES):
        return None
    return _load(location, revision, trust_remote_code=trust_remote_code, local=local)


def _has(location: str, name: str, revision: str | None, local: bool) -> bool:
    try:
        found = cached_file(
            location,
            name,
            revision=revision,
            local_files_only=local,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError):
        # A model in memory may bear any name.
        if local:
            return False
        raise
    return found is not None


def _load(
    location: str,
    revision: str | None,
    *,
    trust_remote_code: bool,
    local: bool,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    given = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            **given,
        )
    # Its files are read by many hands, in Rust too, which raise what comes: KeyError for
    # added_tokens, JSONDecodeError, plain Exception.
    except Exception as error:
        if (broken := damaged(Path(location), (".json", ".model"))) is not None:
            raise broken from error
        said = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"the tokenizer of {location} cannot be read ({type(error).__name__}: {said}): "
            f"expected the files that save_pretrained writes ({', '.join(_FILES[:2])}); download "
            "or save it again"
        ) from error
    return tokenizer
