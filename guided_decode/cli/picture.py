"""Where a command's picture goes."""

from __future__ import annotations

from pathlib import Path

from guided_decode.cli.errors import Refusal


def checked_picture(plot: Path) -> Path:
    """The file of `--plot`; a name without a suffix is a PNG's.

    Raises Refusal, or ImportError without matplotlib: at once what would fail after all the work.
    """
    from guided_decode.lab.demo.plot import require_matplotlib, suffixes

    require_matplotlib()
    if plot.is_dir():
        raise Refusal(f"--plot {plot} is a folder: expected a file, such as {plot / 'plot.png'}")
    if not plot.suffix:
        plot = plot.with_name(plot.name + ".png")
    if plot.suffix[1:].lower() not in suffixes():
        raise Refusal(f"--plot {plot}: expected a name that ends in one of "
                      f"{', '.join(suffixes())}")  # fmt: skip
    if not plot.parent.is_dir():
        raise Refusal(f"--plot {plot}: no such folder {plot.parent}")
    return plot
