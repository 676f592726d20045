"""The table at the end of a run."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

RUNS = {
    "sft_greedy": "SFT, greedy",
    "sft_sampled": "SFT, temperature 1",
    "ppo_greedy": "PPO, greedy",
    "ppo_sampled": "PPO, temperature 1",
}


WIDTH = 120  # a log file or a pipe has no width of its own


def table(seeds: Sequence[dict[str, Any]]) -> Table:
    """One row for each seed, policy and way of decoding."""
    result = Table(title="tiny-tulu: held-out accuracy without and with the PPO run's value model")
    result.add_column("seed", justify="right", no_wrap=True)
    result.add_column("policy", no_wrap=True)
    for column in ("alone", "guided", "gain", "95%", "beta", "k", "KL", "AUC half", "AUC end"):
        result.add_column(column, justify="right", no_wrap=True)
    for seed in seeds:
        for key, label in RUNS.items():
            result.add_row(str(seed["seed"]), label, *_cells(seed[key]))
        result.add_section()
    return result


def _cells(run: dict[str, Any]) -> list[str]:
    """Gains in points; KL(guided ‖ policy) in nats a token; AUC of V for sampled responses."""
    return [
        f"{run['accuracy']:.1%}",
        f"{run['guided']:.1%}",
        f"{run['gain'] * 100:+.1f}",
        f"{run['gain_low'] * 100:+.1f} to {run['gain_high'] * 100:+.1f}",
        f"{run['beta']:g}",
        str(run["top_k"]),
        f"{run['kl_per_token']:.4f}",
        f"{run['auc_half']:.3f}" if "auc_half" in run else "",
        f"{run['auc_end']:.3f}" if "auc_end" in run else "",
    ]
