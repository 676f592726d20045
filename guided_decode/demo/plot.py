"""Quality against compute as a picture: one panel a policy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guided_decode.demo.measure import Outcome

# curve: (its name in the legend, colour, marker).
STYLES = {
    "greedy": ("greedy, plain and guided", "#8c8c8c", "s"),
    "best of n": ("best of n samples, ranked by the critic", "#d95f02", "o"),
    "reweight": ("guided, reweight (k candidates)", "#1f78b4", "D"),
    "gated": ("guided, reweight, gated", "#1b9e77", "^"),
    "prune": ("guided, prune", "#7570b3", "v"),
}


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the plot needs matplotlib, which is not installed: pip install 'guided-decode[plots]'"
        ) from error


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes a picture of all outcomes (the suffix says of what kind).

    Raises ImportError without matplotlib, ValueError or OSError where it cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    figure = Figure(figsize=(10.0, 4.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(policies), sharex=True, sharey=True, squeeze=False)[0]
    for panel, policy in zip(panels, policies, strict=True):
        _draw_panel(panel, [outcome for outcome in outcomes if outcome.policy == policy])
        panel.set_title(f"{policy} policy", loc="left", fontsize=11)
    panels[0].set_ylabel("right answers (95% interval)")
    figure.supxlabel("tokens forwarded an answer, by policy and critic (same size)", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_panel(panel: Any, outcomes: Sequence[Outcome]) -> None:
    for curve, (label, colour, marker) in STYLES.items():
        points = sorted(
            (o for o in outcomes if o.method.curve == curve), key=lambda o: o.tokens_per_answer
        )
        if not points:
            continue
        x = [point.tokens_per_answer for point in points]
        y = [point.accuracy for point in points]
        spans = [point.interval for point in points]
        below = [value - low for value, (low, _) in zip(y, spans, strict=True)]
        above = [high - value for value, (_, high) in zip(y, spans, strict=True)]
        # Plain and guided greedy are two methods, not two points of one.
        line = "none" if curve == "greedy" else "-"
        panel.errorbar(x, y, yerr=[below, above], label=label, color=colour, marker=marker,
                       linestyle=line, linewidth=1.5, markersize=5, elinewidth=0.8,
                       capsize=2)  # fmt: skip
        for point, at, height in zip(points, x, y, strict=True):
            panel.annotate(point.method.label, (at, height), xytext=(5, -11), fontsize=8,
                           textcoords="offset points", color=colour)  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    panel.set_ylim(0.0, 1.04)
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
