"""A page in a window of its own, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import PATIENCE


class Opened:
    """The page, and all that it said or asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        """options: of `new_context`, the width, the colour scheme, touch."""
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        self.context.set_default_timeout(PATIENCE * 1000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = file.as_uri()
        self.page.goto(self.url)

    def token(self, run: int, token: int) -> Any:
        return self.page.locator(f"#token-{run}-{token}")

    def selected(self) -> tuple[int, int]:
        """Run and token; the only ones that anything on the page calls selected."""
        (one,) = self.page.locator("[role=option][aria-selected=true]").all()
        assert "selected" in one.get_attribute("class").split()
        run = int(one.locator("..").get_attribute("data-run"))
        focus = self.page.locator(f"[role=listbox][data-run='{run}']")
        assert focus.get_attribute("aria-activedescendant") == one.get_attribute("id")
        return run, int(one.get_attribute("data-token"))

    def rows(self) -> list[tuple[str, list[str], list[str | None], bool]]:
        """Of each candidate: name, cells as shown and as numbers, whether it was taken."""
        return [
            (
                row.locator("th bdi").inner_text(),
                row.locator("td").all_inner_texts(),
                [cell.get_attribute("data-number") for cell in row.locator("td").all()],
                row.get_attribute("aria-current") == "true",
            )
            for row in self.page.locator("#table tbody tr").all()
        ]

    def close(self) -> None:
        """Raises AssertionError: it said something, or asked for more than itself."""
        self.context.close()
        assert self.said == []
        assert self.asked == [self.url]
