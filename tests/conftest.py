"""What every test of this folder needs: one thread for models this small, and quiet libraries."""

from __future__ import annotations

import signal
import tempfile
from importlib.util import find_spec

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    odd = next((item.nodeid for item in items if tempfile.gettempdir() in item.nodeid), None)
    if odd is not None:
        # Workers would name it otherwise, and xdist ends the run.
        raise pytest.UsageError(f"{odd} has a temporary path in its name: make it in the test")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
