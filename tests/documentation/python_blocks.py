"""Running Python blocks, as if each file of documentation were typed in from the top."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.utils import import_utils

from tests import ROOT
from tests.documentation.markdown_blocks import PYTHON, Block, read_blocks
from tests.documentation.stand_ins import GIVEN, stand_in

# What only an extra of the package brings. The blocks have to do without, but for theirs.
_EXTRAS = ("accelerate", "datasets", "matplotlib", "peft")
# What an extra brings of these, itself included.
_BROUGHT = {"peft": ("peft", "accelerate")}


@functools.cache
def run_python(block: Block) -> dict[str, Any]:
    """The names after a block has run, and what it continues before it.

    Raises what the block raises, its lines being those of the Markdown file.
    """
    for extra in block.clause("extra"):
        pytest.importorskip(extra, reason=f"{extra} is not installed")
    names: dict[str, Any] = {"__name__": "__main__"}
    if block.has("continues"):
        names = dict(run_python(_before(block)))
    for name in block.clause("given"):
        if name not in GIVEN:
            raise ValueError(f"{block}: given {name}: say in stand_ins.GIVEN what makes it")
        names[name] = GIVEN[name]()
    code = block.code
    for needs in block.clause("needs"):
        code = stand_in(code, needs)
    # Empty lines before it, so that a traceback has the file's line numbers.
    padded = "\n" * (block.line - 1) + code
    with torch.enable_grad(), _without_extras(block.clause("extra")):
        exec(compile(padded, ROOT / block.file, "exec"), names)
    return names


def _before(block: Block) -> Block:
    (file,) = block.clause("continues") or (block.file,)
    before = [
        other
        for other in read_blocks(file)
        if other.language == PYTHON and (file != block.file or other.line < block.line)
    ]
    if not before:
        raise ValueError(f"{block}: continues {file}, which has no Python before it")
    return before[-1]


@contextlib.contextmanager
def _without_extras(but: tuple[str, ...]) -> Iterator[None]:
    """Hides the extras; transformers remembers whether it saw the one that it uses by itself."""
    remembered = import_utils.is_accelerate_available
    kept = {name for extra in but for name in _BROUGHT[extra]}
    hidden = [name for name in _EXTRAS if name not in kept]
    there = {name: sys.modules[name] for name in hidden if name in sys.modules}
    sys.modules.update(dict.fromkeys(hidden))
    remembered.cache_clear()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(there)
        remembered.cache_clear()
