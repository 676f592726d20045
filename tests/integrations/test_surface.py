"""What we touch of each engine stands in its surface.py, and the installed one has it."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guided_decode.integrations.host_surface import Surface
from guided_decode.integrations.transformers import custom_generate, trunk_options
from scripts import host_surface
from scripts.static_names import Sources
from scripts.surface_check import compare
from tests import ROOT

SURFACES = {surface.package: surface for surface in host_surface.SURFACES}
OURS = sorted(
    path.relative_to(ROOT)
    for folder in ("guided_decode", "integrations")
    for path in (ROOT / folder).rglob("*.py")
)


def paths(surface: Surface) -> set[str]:
    return {name.path for name in surface.names}


def attributes(surface: Surface, ending: str) -> set[str]:
    """Everything that the records have of a class."""
    own = [name for name in surface.names if name.path.endswith(f".{ending}")]
    methods = {name.path.rpartition(".")[2] for name in surface.names
               if name.path.rpartition(".")[0].endswith(f".{ending}")}  # fmt: skip
    return methods | {each for name in own for each in (*name.has, *name.may_have)}


@pytest.mark.parametrize("package", SURFACES)
def test_the_installed_engine_has_what_we_touch(package):
    found = [r for r in host_surface.installed() if r.surface.package == package]
    if not found:
        pytest.skip(f"{package} is not installed")
    (release,) = found
    sources = Sources(release.folder, package)
    comparison = compare(release.surface, sources, release.version)
    assert comparison.holds, "\n".join(map(str, comparison.differences))


def imported(path: str) -> object:
    """What a path leads to when it is imported for real."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(imported(owner), name)


@pytest.mark.parametrize("name", SURFACES["transformers"].names, ids=lambda name: name.path)
def test_what_is_read_off_the_sources_is_what_an_import_gives(name):
    found = imported(name.path)
    if name.takes is not None:
        parameters = inspect.signature(inspect.unwrap(found)).parameters
        for wanted in (*name.takes.in_order, *name.takes.by_name):
            assert set(wanted.split("|")) & set(parameters)


def imports_of(package: str, file: Path) -> Iterator[str]:
    """Dotted paths of everything that a file imports of a package, wherever it does."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (path for path in imported if path.partition(".")[0] == package)


@pytest.mark.parametrize("package", SURFACES)
def test_every_import_of_an_engine_is_in_its_surface(package):
    found = {path for file in OURS for path in imports_of(package, file)}
    assert found
    assert found <= paths(SURFACES[package])


# (our file, a variable or attribute of `self` there, the class of what it holds)
READ = [
    ("integrations/vllm/build.py", "vllm_config", "VllmConfig"),
    ("integrations/vllm/build.py", "model", "ModelConfig"),
    ("integrations/vllm/build.py", "parallel", "ParallelConfig"),
    ("integrations/vllm/build.py", "scheduler", "SchedulerConfig"),
    ("integrations/vllm/build.py", "group", "GroupCoordinator"),
    ("integrations/vllm/client_values/worker.py", "parallel", "ParallelConfig"),
    ("integrations/vllm/client_values/offline.py", "output", "RequestOutput"),
    ("integrations/vllm/generator.py", "config", "ModelConfig"),
    ("integrations/vllm/generator.py", "flat", "FlatLogprobs"),
    ("integrations/vllm/generator.py", "llm", "LLM"),
    ("integrations/vllm/generator.py", "llm_engine", "LLMEngine"),
    ("integrations/vllm/generator.py", "output", "CompletionOutput"),
    ("integrations/vllm/request.py", "params", "SamplingParams"),
    ("integrations/vllm/request_ends.py", "params", "SamplingParams"),
    ("integrations/vllm/slot_rows.py", "_states", "LogitsProcRequestState"),
    ("integrations/vllm/slot_rows.py", "context", "LogitsContext"),
    ("integrations/vllm/slot_tokens.py", "_states", "LogitsProcRequestState"),
    ("integrations/vllm/slot_tokens.py", "context", "LogitsContext"),
    ("integrations/vllm/speculation.py", "scheduler", "SchedulerConfig"),
    ("integrations/vllm/speculation.py", "speculative", "SpeculativeConfig"),
    ("integrations/vllm/trunk_tap.py", "model_class", "VllmModelForTextGeneration"),
    ("guided_decode/forward/packed_model.py", "model", "PreTrainedModel"),
    ("guided_decode/scoring/next_logits.py", "policy", "PreTrainedModel"),
    ("integrations/transformers/custom_generate.py", "generation_config", "GenerationConfig"),
    ("integrations/transformers/trunk_lookahead.py", "generation_config", "GenerationConfig"),
    ("integrations/transformers/trunk_options.py", "config", "GenerationConfig"),
    ("integrations/transformers/trunk_run.py", "options", "GenerationConfig"),
    ("integrations/transformers/trunk_run.py", "streamer", "BaseStreamer"),
]


def read_of(file: str, variable: str) -> set[str]:
    """Attributes that a file reads of a variable, by a dot or by getattr."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            owner, name = node.args[0], getattr(node.args[1], "value", None)
        else:
            continue
        if variable in (getattr(owner, "id", None), getattr(owner, "attr", None)) and name:
            found.add(name)
    return found


@pytest.mark.parametrize(("file", "variable", "ending"), READ)
def test_every_attribute_that_we_read_is_in_the_surface(file, variable, ending):
    known = {each for surface in SURFACES.values() for each in attributes(surface, ending)}
    found = read_of(file, variable)
    assert found
    assert found <= known


def test_names_that_are_looked_up_by_strings_are_in_the_surface():
    surface = SURFACES["transformers"]
    behind = (*custom_generate._AFTER_GUIDANCE, *trunk_options._STATEFUL)
    assert {each.__name__ for each in behind} <= attributes(surface, "logits_process")
    assert set(trunk_options._REFUSED) <= attributes(surface, "GenerationConfig")


@pytest.mark.parametrize("package", SURFACES)
def test_every_record_names_one_of_our_files_which_has_its_attributes(package):
    for name in SURFACES[package].names:
        text = (ROOT / name.used_in).read_text()
        spelt = [one for each in (*name.has, *name.may_have) for one in each.split("|")]
        # Options of vLLM are written with dashes.
        assert [one for one in spelt if one not in text and one.replace("_", "-") not in text] == []


@pytest.mark.parametrize("package", SURFACES)
def test_a_surface_imports_no_engine(package):
    code = (
        f"import sys, guided_decode.integrations.{package}.surface; "
        "print(sorted({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stderr
