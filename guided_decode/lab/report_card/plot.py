"""A report card as a picture: ranks, calibration, and what a beta costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guided_decode.lab.demo.plot import require_matplotlib
from guided_decode.lab.report_card.card import ReportCard

_BLUE, _ORANGE, _GREY = "#1f78b4", "#d95f02", "#7f7f7f"


def draw(card: ReportCard, path: Path) -> None:
    """Writes the picture (the suffix says of what kind).

    Raises ImportError without matplotlib, ValueError or OSError where it cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels = 3 if card.curve else 2
    figure = Figure(figsize=(4.2 * panels, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_ranks(axes[0], card)
    _draw_calibration(axes[1], card)
    if card.curve:
        _draw_kl(axes[2], card)
    for panel in axes:
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{card.scorer}: {card.rollouts:,} held-out rollouts", fontsize=11)
    figure.savefig(path)


def _draw_ranks(panel: Any, card: ReportCard) -> None:
    for name, colour in (("auc", _BLUE), ("spearman", _ORANGE)):
        points = [(each.fraction, getattr(each, name)) for each in card.ranks]
        points = [(fraction, figure) for fraction, figure in points if figure is not None]
        label = {"auc": "AUC", "spearman": "Spearman"}[name]
        if points:
            panel.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
    panel.axhline(0.5, color=_GREY, linewidth=0.8, linestyle="--")
    panel.set_xticks([0.25, 0.5, 0.75, 1.0], ["25%", "50%", "75%", "100%"])
    panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.02)
    panel.set_xlabel("of the response read")
    if panel.lines[:-1]:
        panel.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_calibration(panel: Any, card: ReportCard) -> None:
    values, rewards = [b.value for b in card.bins], [b.reward for b in card.bins]
    ends = [min(values + rewards), max(values + rewards)]
    panel.plot(ends, ends, color=_GREY, linewidth=0.8, linestyle="--")
    panel.plot(values, rewards, color=_BLUE, marker="o")
    panel.set_xlabel("V, mean of each tenth of the prefixes")
    panel.set_ylabel("reward, mean")
    panel.set_title(f"calibration error {card.calibration_error:.3f}", loc="left", fontsize=10)


def _draw_kl(panel: Any, card: ReportCard) -> None:
    panel.plot(*zip(*card.curve, strict=True), color=_BLUE)
    for each in card.suggestions:
        if each.beta is not None:
            panel.plot(each.beta, each.budget, color=_ORANGE, marker="o")
            panel.annotate(f"{each.beta:.3g}", (each.beta, each.budget), xytext=(5, -10),
                           textcoords="offset points", fontsize=8)  # fmt: skip
    panel.set_xlabel("beta")
    panel.set_ylabel("KL from the policy, nats a token")
