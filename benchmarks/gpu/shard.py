"""A pytest plugin: `-p benchmarks.gpu.shard --shard 2/4` runs every fourth test, from the second.

Most of a kernel test is its compilation, which one process does one after another.
"""

from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="1/1", help="which of how many parts, as 2/4")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    part, parts = map(int, config.getoption("--shard").split("/"))
    items[:] = items[part - 1 :: parts]
