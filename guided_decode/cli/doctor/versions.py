"""Versions, and the ranges that this package's own metadata asks for."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec

from guided_decode.cli.doctor.finding import Finding, Status

DISTRIBUTION = "guided-decode"
# What may be installed beside, by extra; of interest to whoever reads a report.
_BESIDE = ("numpy", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "peft",
           "bitsandbytes", "torchao", "gguf", "pyzmq", "msgspec")  # fmt: skip
_NOT_CHECKED = "its range is not known: guided-decode is not installed, it runs from a folder"


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is there."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_importable(module: str) -> bool:
    """Whether a module would be found; nothing is run."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def range_of(distribution: str) -> str | None:
    """The versions that this package takes, ">=5.16,<6"; None where nothing is known."""
    try:
        from packaging.requirements import Requirement

        for line in requires(DISTRIBUTION) or ():
            wanted = Requirement(line)
            if wanted.name == distribution:
                return str(wanted.specifier)
    except (ImportError, PackageNotFoundError):
        pass
    return None


def in_range(found: str, wanted: str) -> bool:
    """Whether a version is in a range; a local build ("+cpu") and a release candidate are."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def against_range(check: str, distribution: str, found: str, said: str) -> Finding:
    """A version that is there, held against the range of `distribution`."""
    wanted = range_of(distribution)
    if wanted is None:
        return Finding(check, Status.OK, f"{said} ({_NOT_CHECKED})")
    if in_range(found, wanted):
        return Finding(check, Status.OK, f"{said} (supported: {wanted})")
    return Finding(check, Status.WARNING, f"{said} is not in the supported range, {wanted}",
                   f'pip install "{distribution}{wanted}"')  # fmt: skip


def own() -> Finding:
    """This package."""
    import guided_decode

    beside = [f"{name} {found}" for name in _BESIDE if (found := installed(name)) is not None]
    return Finding(DISTRIBUTION, Status.OK, f"{guided_decode.__version__} with {', '.join(beside)}")


def python() -> Finding:
    """The interpreter and the system."""
    found = platform.python_version()
    said = f"{found}, {platform.system()} {platform.release()}, {platform.machine()}"
    try:
        wanted = metadata(DISTRIBUTION)["Requires-Python"]
        fits = in_range(found, wanted)
    except (ImportError, PackageNotFoundError):
        return Finding("Python", Status.OK, f"{said} ({_NOT_CHECKED})")
    if fits:
        return Finding("Python", Status.OK, f"{said} (supported: {wanted})")
    return Finding("Python", Status.FAILURE, f"{said} is not in the supported range, {wanted}",
                   f"make a virtual environment with a Python {wanted} "
                   f"(this one is {sys.implementation.name})")  # fmt: skip
