"""Quality against a cost as a picture: a panel a policy, a line a method, and the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from guided_decode.lab.ablate.summary import Figures, front
from guided_decode.lab.demo.plot import require_matplotlib

FORMATS = ("png", "svg")
# Colours that are told apart by those who do not see all of them (Okabe and Ito), and in grey by
# the marker.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_MARKERS = "oDs^vPXd<>*"
_PANEL = (5.2, 4.4)
_LABELLED = 12


def draw(
    figures: Sequence[Figures],
    cost: Callable[[Figures], float | None],
    title: str,
    quality: str,
    *,
    bounds: bool = False,
) -> dict[str, bytes]:
    """The picture as PNG and SVG, by their names' endings; the same figures give the same bytes.

    cost: of a row; None leaves it out. title: of the costs' axis. quality: of the other one.
    bounds: rows whose cost is only known to be at most so have hollow marks.

    Raises ImportError without matplotlib.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(each.setting.policy for each in figures))
    pictures: dict[str, bytes] = {}
    with matplotlib.rc_context({"svg.hashsalt": "guided-decode", "svg.fonttype": "path"}):
        size = (_PANEL[0] * len(policies), _PANEL[1] + 0.6)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        panels = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
        styles = _styles(figures)
        for panel, policy in zip(panels, policies, strict=True):
            own = [each for each in figures if each.setting.policy == policy]
            _draw_panel(panel, own, cost, styles, bounds)
            panel.set_title(policy.replace("$", r"\$"), loc="left", fontsize=11)
            panel.set_xlabel(title)
        panels[0].set_ylabel(quality)
        _legend(figure, panels)
        for ending in FORMATS:
            written = io.BytesIO()
            # Neither the day nor matplotlib's version.
            unsigned = {"Date": None, "Creator": None} if ending == "svg" else {"Software": None}
            figure.savefig(written, format=ending, metadata=unsigned)
            pictures[ending] = written.getvalue()
    return pictures


def _styles(figures: Sequence[Figures]) -> dict[str, tuple[str, str]]:
    curves = dict.fromkeys(each.setting.curve for each in figures)
    return {
        curve: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, curve in enumerate(curves)
    }


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(3, len(handles)),
        frameon=False, fontsize=8,
    )  # fmt: skip


def _draw_panel(
    panel: Any, rows: Sequence[Figures], cost: Callable[[Figures], float | None],
    styles: dict[str, tuple[str, str]], bounds: bool,
) -> None:  # fmt: skip
    known = [(each, at) for each in rows if (at := cost(each)) is not None]
    for curve in dict.fromkeys(each.setting.curve for each, _ in known):
        points = sorted(((r, at) for r, at in known if r.setting.curve == curve),
                        key=lambda point: point[1])  # fmt: skip
        _draw_curve(panel, points, curve, styles[curve], bounds)
    _draw_front(panel, known)
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    costs = [at for _, at in known]
    if costs and min(costs) > 0 and max(costs) > 8 * min(costs):
        panel.set_xscale("log")
        _number_ticks(panel)


def _number_ticks(panel: Any) -> None:
    """Tokens and seconds as they are, and not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _draw_curve(
    panel: Any, points: Sequence[tuple[Figures, float]], curve: str, style: tuple[str, str],
    bounds: bool,
) -> None:  # fmt: skip
    colour, marker = style
    x, y = [at for _, at in points], [row.quality.mean for row, _ in points]
    # Where nearly all is right, an end may be the mean itself, up to its last digit.
    below = [max(0.0, row.quality.mean - row.quality.low) for row, _ in points]
    above = [max(0.0, row.quality.high - row.quality.mean) for row, _ in points]
    hollow = bounds and not all(row.kl_exact for row, _ in points)
    name = f"{curve} (at most)" if hollow else curve
    # A line between points that differ in several ways says nothing.
    one_way = len(points[0][0].setting.swept) == 1
    panel.errorbar(
        x, y, yerr=[below, above], label=name.replace("$", r"\$"), color=colour, marker=marker,
        markerfacecolor="white" if hollow else colour, linewidth=1.1, markersize=5,
        linestyle="-" if one_way else "none",
        elinewidth=0.7, capsize=2, alpha=0.9,
    )  # fmt: skip
    for row, at in points if len(points) <= _LABELLED else ():
        text = row.setting.values.replace("$", r"\$")
        panel.annotate(text, (at, row.quality.mean), xytext=(4, 4), fontsize=6, color=colour,
                       textcoords="offset points")  # fmt: skip


def _draw_front(panel: Any, known: Sequence[tuple[Figures, float]]) -> None:
    if not known:
        return
    costs, qualities = [at for _, at in known], [row.quality.mean for row, _ in known]
    best = front(costs, qualities)
    x, y = [costs[i] for i in best], [qualities[i] for i in best]
    # Nothing to the right of the last is better: it goes on as it is.
    panel.step([*x, max(costs)], [*y, y[-1]], where="post", color="#444444", linewidth=0.9,
               linestyle=(0, (4, 3)), label="Pareto front", zorder=1)  # fmt: skip
