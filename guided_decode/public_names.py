"""The public names of a package, each imported when it is first asked for.

torch and transformers take seconds to import: `guided-decode --help` needs neither.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def handed_on(
    package: str, homes: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`, from {public name: the module that holds it}."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def listed() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return get, listed
