"""The table at the end of a run."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

WIDTH = 170  # a log file or a pipe has no width of its own


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One row for each seed and task.

    Mean rewards at temperature 1; gains with their 95% interval; KL in nats a token; tokens of
    policy and critic for a guided answer, in those of a plain one; V by rank correlation with the
    reward (sentiment) or AUC (constraints).
    """
    result = Table(title="smol: mean held-out reward at temperature 1, without and with the critic")
    result.add_column("seed", justify="right", no_wrap=True)
    result.add_column("task", no_wrap=True)
    columns = ("plain", "PPO", "guided", "gain", "by trunk", "gain", "best of 4\nby critic",
               "best of 4\nby judge", "beta", "KL", "tokens", "V at 25, 50, 75, 100%",
               "trunk's")  # fmt: skip
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        for name, figures in run["results"].items():
            result.add_row(str(run["seed"]), name, *_cells(figures))
        result.add_section()
    return result


def _cells(run: dict[str, Any]) -> list[str]:
    tokens = run["tokens"]
    return [
        f"{run['plain']:+.2f}",
        f"{run['ppo']:+.2f}",
        f"{run['guided']:+.2f}",
        _gain(run["gain"]),
        f"{run['trunk']:+.2f}",
        _gain(run["trunk_gain"]),
        f"{run['best_of_4_by_critic']:+.2f}",
        f"{run['best_of_4_by_judge']:+.2f}",
        f"{run['beta']:g}",
        f"{run['kl_per_token']:.3f}",
        f"{tokens['guided'] / tokens['plain']:.1f}",
        " ".join(f"{value:.2f}" for value in run["foresight"].values()),
        " ".join(f"{value:.2f}" for value in run["trunk_foresight"].values()),
    ]


def _gain(gain: Sequence[float]) -> str:
    mean, low, high = gain
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
