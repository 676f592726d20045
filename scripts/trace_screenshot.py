"""The README's pictures of a trace: `make trace-screenshot`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from guided_decode.cli.app import app
from scripts.chromium import Missing, chromium

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPT = "What is 4785 + 5426?"
# By the colour scheme; a page of this width has all in sight.
PICTURES = {"light": "trace.png", "dark": "trace-dark.png"}
_WIDTH, _HEIGHT = 1120, 600


def main(folder: Path = DOCS) -> None:
    """Writes the pictures. Raises Missing: there is no browser."""
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        page = Path(scratch) / "trace.html"
        ended = CliRunner().invoke(app, ["trace", "--prompt", PROMPT, "--output", str(page)])
        if ended.exit_code:
            sys.exit(ended.output)
        for scheme, name in PICTURES.items():
            context = browser.new_context(
                viewport={"width": _WIDTH, "height": _HEIGHT}, color_scheme=scheme
            )
            window = context.new_page()
            window.goto(page.as_uri())
            window.screenshot(path=folder / name, full_page=True)
            context.close()
            print(f"{folder / name}: {(folder / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except Missing as missing:
        sys.exit(f"trace_screenshot: {missing}")
