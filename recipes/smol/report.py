"""The table at the end of a run."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

WIDTH = 170  # a log file or a pipe has no width of its own


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One row for each seed, policy and task."""
    result = Table(title="smol: mean held-out reward at temperature 1, without and with the critic")
    result.add_column("seed", justify="right", no_wrap=True)
    result.add_column("policy, task", no_wrap=True)
    columns = ("plain", "guided", "gain", "95%", "best of 4\nby judge", "best of 4\nby critic",
               "beta", "KL", "tokens", "V at 25%", "50%", "75%", "100%")  # fmt: skip
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        for key, figures in run["results"].items():
            result.add_row(str(run["seed"]), key.replace("_", ", "), *_cells(figures))
        result.add_section()
    return result


def _cells(run: dict[str, Any]) -> list[str]:
    """KL in nats a token; tokens of policy and critic for a guided answer, in those of a plain one;
    V by rank correlation with the reward (sentiment) or AUC (constraints)."""
    return [
        f"{run['plain']:+.3f}",
        f"{run['guided']:+.3f}",
        f"{run['gain']:+.3f}",
        f"{run['gain_low']:+.3f} to {run['gain_high']:+.3f}",
        f"{run['best_of_4_by_judge']:+.3f}",
        f"{run['best_of_4_by_critic']:+.3f}",
        f"{run['beta']:g}",
        f"{run['kl_per_token']:.3f}",
        f"{run['tokens_guided'] / run['tokens_plain']:.1f}",
        *(f"{value:.2f}" for value in run["foresight"].values()),
    ]
