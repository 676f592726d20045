"""What every test of this folder needs: one thread for models this small, and quiet libraries."""

from __future__ import annotations

import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging


def settle_hypothesis() -> None:
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "guided-decode",
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("guided-decode")


# The GPU's tests run without it.
if find_spec("hypothesis"):
    settle_hypothesis()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left to `make test-full`")
    # Without pytest-timeout the mark says nothing.
    config.addinivalue_line("markers", "timeout: seconds that a test may take")
    torch.set_num_threads(1)
    # A shell that runs the tests in the background hands down an ignored Ctrl-C, to children, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # What is claimed in float32 is no claim about TF32, whatever the environment asks for.
    torch.set_float32_matmul_precision("highest")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


# Helpers' assertions say what they saw, too.
pytest.register_assert_rewrite(
    *(f"tests.{each.stem}" for each in Path(__file__).parent.iterdir() if each != Path(__file__))
)

# Of these each file takes a worker a minute or more: the first, so that none ends alone.
_LONG = (
    "integrations/vllm/test_server.py",
    "kernels/test_interpreter.py",
    "recipes/test_tiny_tulu_guided.py",
    "integrations/vllm/test_engine.py",
    "integrations/vllm/test_runner_v2.py",
    "forward/test_shards.py",
    "cli/test_sharded.py",
    "integrations/vllm/test_fuzz.py",
    "cache/test_properties.py",
    "examples/test_checkpoints.py",
)


def _place(item: pytest.Item) -> int:
    file = item.path.as_posix()
    return next((i for i, each in enumerate(_LONG) if file.endswith(f"tests/{each}")), len(_LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    odd = next((item.nodeid for item in items if tempfile.gettempdir() in item.nodeid), None)
    if odd is not None:
        # Workers would name it otherwise, and xdist ends the run.
        raise pytest.UsageError(f"{odd} has a temporary path in its name: make it in the test")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
