"""Command lines and requests of vLLM, read by vLLM's own parser and the server's own check."""

import functools
import importlib
import json
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest

from tests.documentation.shell_reading import Command

# vLLM moved it.
_PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
_CURL_OPTIONS = {"-s": 0, "-H": 1, "-d": 1}
_SERVED = "tiny-tulu"


def require() -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


def options() -> set[str]:
    """Every option of vLLM's server."""
    return {option for action in _parser()._actions for option in action.option_strings}


def check_launch(command: Command) -> None:
    """A server's command line: vLLM's options, and our configuration as the worker reads it."""
    arguments = _read(command)
    for name in arguments.logits_processors or ():
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute)
    for name in (*arguments.middleware, arguments.worker_extension_cls):
        module, _, attribute = name.rpartition(".")
        assert not module or hasattr(importlib.import_module(module), attribute), name
    if arguments.logits_processors or arguments.additional_config:
        from guided_decode.integrations.vllm.server_config import CONFIG_VARIABLE, config_of

        told = {name: command.environment[name] for name in (CONFIG_VARIABLE,)
                if name in command.environment}  # fmt: skip
        with mock.patch.dict("os.environ", told):
            config_of(arguments.additional_config)


def check_request(command: Command, server: Command) -> None:
    """A curl to a server's chat endpoint: vLLM's fields, and what the front end admits."""
    (url,), body = _curl(command)
    arguments = _read(server)
    assert url == f"http://{arguments.host}:{arguments.port}/v1/chat/completions", url
    assert body["model"] in arguments.served_model_name, body
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from guided_decode.integrations.vllm import ValueGuidedLogitsProcessor

    unknown = set(body) - set(ChatCompletionRequest.model_fields)
    assert not unknown, f"{command}: vLLM's requests have no {', '.join(unknown)}"
    request = ChatCompletionRequest.model_validate(body)
    params = request.to_sampling_params(body["max_tokens"], {})
    with mock.patch.dict("os.environ", server.environment):
        ValueGuidedLogitsProcessor.validate_params(params)


def _read(command: Command) -> Namespace:
    """The words of `vllm serve ...`, or of `python -m vllm... ...`."""
    require()
    words = list(command.words[1:] if command.program == "vllm" else command.words[2:])
    return _parser().parse_args(words)


def _curl(command: Command) -> tuple[list[str], dict[str, Any]]:
    """(URLs, JSON body)."""
    words, urls, given = list(command.words), [], {}
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            assert word in _CURL_OPTIONS, f"{command}: expected {', '.join(_CURL_OPTIONS)}"
            given[word] = [words.pop(0) for _ in range(_CURL_OPTIONS[word])]
        else:
            urls.append(word)
    assert given["-H"] == ["Content-Type: application/json"], command
    return urls, json.loads(given["-d"][0])


@functools.cache
def _parser() -> ArgumentParser:
    require()
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (module, *_) = (name for name in _PARSERS if _is_there(name))
    parser: ArgumentParser = importlib.import_module(module).make_arg_parser(
        FlexibleArgumentParser(prog="vllm serve", exit_on_error=False)
    )

    def refuse(message: str) -> None:
        raise AssertionError(f"vllm serve: {message}")

    parser.error = refuse  # type: ignore[assignment, method-assign]
    return parser


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
