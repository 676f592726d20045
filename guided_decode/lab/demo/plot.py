"""Quality against compute as a picture: one panel a policy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guided_decode.lab.demo.measure import Outcome

# curve: (its name in the legend, colour, marker, where its points' labels are, in points).
STYLES = {
    "greedy": ("plain, greedy", "#7f7f7f", "s", (0, 0)),
    "best of n": ("best of n samples, ranked by the critic", "#d95f02", "o", (13, -10)),
    "reweight": ("guided, reweight, k candidates", "#1f78b4", "D", (0, 8)),
    "gated": ("guided, reweight, gated", "#1b9e77", "^", (0, 0)),
    "prune": ("guided, prune", "#7570b3", "v", (0, 0)),
    "best of n, judge": ("best of n samples, ranked by the true judge", "#e7298a", "o", (13, 6)),
    "trunk": ("guided by a head on the policy's own trunk", "#a6761d", "P", (0, 8)),
}


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the plot needs matplotlib, which is not installed: pip install 'guided-decode[plots]'"
        ) from error


def suffixes() -> list[str]:
    """The kinds of picture that matplotlib writes, by their names' endings."""
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes a picture of all outcomes (the suffix says of what kind).

    Raises ImportError without matplotlib, ValueError or OSError where it cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(outcome.policy for outcome in outcomes))
    figure = Figure(figsize=(10.0, 4.9), dpi=150, layout="constrained")
    # Rewards of two judges have nothing to do with each other.
    alike = outcomes[0].task.counted
    panels = figure.subplots(1, len(policies), sharex=True, sharey=alike, squeeze=False)[0]
    for panel, policy in zip(panels, policies, strict=True):
        own = [outcome for outcome in outcomes if outcome.policy == policy]
        _draw_panel(panel, own)
        panel.set_title(own[0].title, loc="left", fontsize=11)
        panel.set_xlabel("tokens forwarded for an answer, policy and critic")
    what = "right answers" if alike else "mean reward"
    panels[0].set_ylabel(f"{what} (95% interval)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_panel(panel: Any, outcomes: Sequence[Outcome]) -> None:
    for curve, (label, colour, marker, offset) in STYLES.items():
        points = sorted(
            (o for o in outcomes if o.method.curve == curve), key=lambda o: o.tokens_per_answer
        )
        if not points:
            continue
        x = [point.tokens_per_answer for point in points]
        y = [point.score for point in points]
        spans = [point.interval for point in points]
        below = [value - low for value, (low, _) in zip(y, spans, strict=True)]
        above = [high - value for value, (_, high) in zip(y, spans, strict=True)]
        panel.errorbar(x, y, yerr=[below, above], label=label, color=colour, marker=marker,
                       linewidth=1.5, markersize=5, elinewidth=0.8, capsize=2)  # fmt: skip
        for point, at, height in zip(points, x, y, strict=True):
            panel.annotate(point.method.label, (at, height), xytext=offset, fontsize=8, ha="center",
                           textcoords="offset points", color=colour)  # fmt: skip
    panel.set_xscale("log", base=2)
    most = max(outcome.tokens_per_answer for outcome in outcomes)
    ticks = [64 * 2**i for i in range(8) if 64 * 2**i <= 1.25 * most]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_xlim(56, max(640, 1.25 * most))
    if outcomes[0].task.counted:
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
        panel.set_ylim(0.0, 1.1)
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
