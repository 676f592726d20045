"""The system's Chromium, driven by Playwright: for pictures of pages, and for tests of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_PLAYWRIGHT = "playwright is not installed (pip install 'guided-decode[trace-test]')"
NO_CHROMIUM = "no Chromium on the path (Debian and Ubuntu: apt install chromium)"


class Missing(Exception):
    """What a browser needs and is not there."""


@contextmanager
def chromium(patience: float = 60.0) -> Iterator[Any]:
    """A headless browser of Playwright's synchronous kind.

    patience: seconds that it may take to start.

    Raises Missing: there is no Playwright, or no Chromium.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise Missing(NO_PLAYWRIGHT) from error
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise Missing(NO_CHROMIUM)
    # As root Chromium has no sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=found, args=arguments, timeout=1000 * patience
        )
        try:
            yield browser
        finally:
            browser.close()
