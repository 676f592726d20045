"""Accuracy against how much of the response was read, as a picture."""

from __future__ import annotations

from pathlib import Path

from guided_decode.lab.demo.plot import require_matplotlib
from guided_decode.lab.rewardbench.outcome import Outcome


def draw(outcome: Outcome, model: str, path: Path) -> None:
    """Writes the picture (the suffix says of what kind).

    Raises ImportError without matplotlib, ValueError or OSError where it cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    parts = sorted(part for part, count in outcome.prefixes.items() if count.of)
    counts = [outcome.prefixes[part] for part in parts]
    accuracies = [count.accuracy for count in counts]
    below = [count.accuracy - count.interval[0] for count in counts]
    above = [count.interval[1] - count.accuracy for count in counts]
    figure = Figure(figsize=(6.0, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.errorbar(parts, accuracies, yerr=[below, above], color="#1f78b4", marker="o",
                   linewidth=1.5, capsize=3)  # fmt: skip
    panel.axhline(0.5, color="#7f7f7f", linewidth=0.8, linestyle="--")
    panel.set_xticks(parts, [f"{part:.0%}" for part in parts])
    panel.set_ylim(0.0, 1.0)
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    panel.set_xlabel("of each response's tokens read")
    panel.set_ylabel("pairs ranked right (95% interval)")
    panel.set_title(model, loc="left", fontsize=11)
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
