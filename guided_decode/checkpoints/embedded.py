"""The models that need no download: files of this package, and of one that an extra brings."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from guided_decode import smol
from guided_decode.checkpoints.smol_policy import smol_policy_folder
from guided_decode.tiny_tulu.embedded import embedded_path

# By a record's `assets`; the others are tiny-tulu's.
_SMOL: Mapping[str, Callable[[], Path]] = {
    "smol/sft": smol_policy_folder,
    **{f"smol/{part}": partial(smol.adapter_path, part) for part in smol.ADAPTERS},
}


def embedded_folder(assets: str) -> Path:
    """The folder of an embedded model or adapter, Hugging Face layout; some are made at first use.

    Raises MissingLibrary: the package that brings it is not installed; or what its maker raises.
    """
    find_folder = _SMOL.get(assets)
    return embedded_path(assets) if find_folder is None else find_folder()
