"""What the text names in passing is there: commands, options, extras, calls and files."""

import ast
import importlib
import inspect
import re
import shlex
from importlib.util import find_spec

import pytest

from guided_decode.cli.app import app
from tests import ROOT
from tests.documentation import vllm_checks
from tests.documentation.command_checks import (
    CHECKS,
    OPTION,
    VENV,
    check_by_name,
    check_extras,
    commands_of,
    guided_decode_options,
    module_options,
)
from tests.documentation.markdown_blocks import SHELLS, markdown_files, read_blocks, read_inline

FILES = markdown_files()
SPANS = [span for file in FILES for span in read_inline(file)]
TEXTS = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}

_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{re.escape(VENV)}\S+|(?:{'|'.join(CHECKS)}) \S).*")
_EXTRA = re.compile(r"(?:'\.|guided-decode)\[([\w,-]+)\]")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
_COMMENT = re.compile(r"(?:^|\s)# (.*)$", re.MULTILINE)
# Where the text's calls come from; the last one may be missing.
_MODULES = (
    "guided_decode",
    "guided_decode.search",
    "guided_decode.testing",
    "guided_decode.integrations.transformers",
    "transformers",
    "vllm",
)


def of(chosen):
    return pytest.mark.parametrize("span", list(dict.fromkeys(chosen)), ids=str)


@of(span for span in SPANS if _COMMAND.fullmatch(span.code))
def test_a_command_is_there(span):
    check_by_name(shlex.split(span.code))


@pytest.fixture(scope="module")
def known_options():
    """Of our commands, of the recipes, and of vLLM's server."""
    recipes = [f"recipes.{path.parent.name}" for path in ROOT.glob("recipes/*/__main__.py")]
    return set.union(
        *map(guided_decode_options, commands_of(app)),
        *map(module_options, recipes),
        vllm_checks.options(),
    )


@pytest.mark.parametrize("file", FILES)
def test_options_are_there(file, known_options):
    texts = [span.code for span in SPANS if span.file == file and span.code.startswith("-")]
    blocks = [block for block in read_blocks(file) if block.language in SHELLS]
    texts += [comment for block in blocks for comment in _COMMENT.findall(block.code)]
    named = {word for text in texts for word in OPTION.findall(text)}
    assert named <= known_options


@pytest.mark.parametrize("file", FILES)
def test_extras_are_the_packages(file):
    for names in _EXTRA.findall(TEXTS[file]):
        check_extras(names)


def calls(code):
    """The calls of functions by name in what is an expression of Python."""
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in nodes if isinstance(node.func, ast.Name)]


@of(span for span in SPANS if calls(span.code))
def test_a_call_has_parameters_of_these_names(span):
    for call in calls(span.code):
        there = [importlib.import_module(name) for name in _MODULES if find_spec(name)]
        found = [module for module in there if hasattr(module, call.func.id)]
        if not found and not find_spec(_MODULES[-1]):
            pytest.skip(f"{_MODULES[-1]} is not installed")
        assert found, f"{span}: no {call.func.id} in {', '.join(_MODULES)}"
        parameters = inspect.signature(getattr(found[0], call.func.id)).parameters
        known = set(parameters)
        if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            # Only vLLM's LLM hands on what it does not know: to the engine, as its server does.
            known |= {option[2:].replace("-", "_") for option in vllm_checks.options()}
        assert {keyword.arg for keyword in call.keywords} <= known


@pytest.mark.parametrize("file", FILES)
def test_files_are_there(file):
    folder = (ROOT / file).parent
    linked = [folder / link for link in _LINK.findall(TEXTS[file])]
    # A file of the repository goes by its place from the root.
    spans = [span.code for span in SPANS if span.file == file and "/" in span.code]
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    named = [ROOT / code for code in spans if code.split("/")[0] in top - {"out", "build", "dist"}]
    assert [path for path in [*linked, *named] if not path.exists()] == []


def test_the_readme_lists_every_command():
    rows = re.findall(r"^\| `guided-decode ([\w-]+)` \|", TEXTS["README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(commands_of(app))


def test_serve_has_an_option_for_every_key_named_as_the_documentation_says():
    pytest.importorskip("pydantic")
    from guided_decode.integrations.vllm.server_config import ServerConfig

    (sentence,) = re.findall(
        r"where `scorer_` comes before (.+?), which would be vLLM's", TEXTS["docs/vllm.md"]
    )
    prefixed = set(re.findall(r"`(\w+)`", sentence))
    keys = set(ServerConfig.model_fields)
    expected = {f"scorer_{key}" if key in prefixed else key for key in keys}
    options = {
        option.removeprefix("--").replace("-", "_")
        for parameter in commands_of(app)["serve"].params
        for option in parameter.opts
    }
    assert expected <= options
    assert not prefixed & options
