"""What an ablation leaves in its folder, and says at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from guided_decode.cli.ablate.run import Run
from guided_decode.cli.terminal import console
from guided_decode.lab.ablate import tables
from guided_decode.lab.ablate.outcomes import Outcome
from guided_decode.lab.ablate.plots import draw
from guided_decode.lab.ablate.store import write_whole
from guided_decode.lab.ablate.summary import AtCost, Figures, at_equal_cost, summarise

# What the clock says differs between runs: these files alone have it.
CLOCKED = ("clock.csv", "pareto_seconds.png", "pareto_seconds.svg")
_COLUMNS = 100


def write_report(run: Run, config: Path, text: bytes, *, plots: bool) -> None:
    """Writes the files, each whole or not at all, and prints the table. Raises OSError.

    text: of the config, as it was read.
    """
    outcomes, folder = run.outcomes(), run.store.folder
    figures = summarise(outcomes)
    at_cost = at_equal_cost(
        outcomes, run.ablation.budgets, run.ablation.against, run.ablation.counting
    )
    seconds = [each.seconds_per_answer for each in outcomes]
    pictures = _pictures(figures, seconds, run) if plots else {}
    prompts = [_prompt(row) for row in run.rows]
    rows = tables.rows_of(figures)
    about = _about(run)
    files: dict[str, bytes] = {
        "config.yaml": text,
        "responses.jsonl": b"".join(tables.response_lines(outcomes, prompts)),
        "settings.csv": tables.as_csv(rows),
        "clock.csv": tables.as_csv(_clock(outcomes)),
        **pictures,
        "report.md": _page(config, about, figures, at_cost, pictures).encode(),
    }
    summary = {"about": about, "settings": rows, "equal_cost": tables.cost_rows(at_cost)}
    # Of all the last: that it is there says that the others are.
    files["summary.json"] = json.dumps(summary, indent=1, ensure_ascii=False).encode() + b"\n"
    for name, content in files.items():
        write_whole(folder / name, content)
    out = console(at_least=_COLUMNS)
    out.print(_table(figures, seconds, run.ablation.counting))


def _prompt(row: Any) -> dict[str, Any]:
    own = row.line({}, "")
    return {name: value for name, value in own.items() if name not in ("key", "run")}


def _quality(run: Run) -> str:
    assert run.ablation.reward is not None
    kind = run.ablation.reward.kind
    return f"reward, {kind} (95% interval)"


def _about(run: Run) -> dict[str, Any]:
    reward = run.ablation.reward
    assert reward is not None
    return {
        "prompts": len(run.rows),
        "limit": run.limit,
        "seeds": list(run.ablation.seeds),
        "max_new_tokens": run.ablation.max_new_tokens,
        "counting": run.ablation.counting,
        "reward": {"kind": reward.kind, **reward.given},
        "policies": {label: model.model for label, model in run.ablation.policies.items()},
        "scorers": {label: model.model for label, model in run.ablation.scorers.items()},
        "versions": {
            name: version(name) for name in ("guided-decode", "torch", "transformers", "numpy")
        },
    }


def _page(
    config: Path, about: Mapping[str, Any], figures: Sequence[Figures], at_cost: Sequence[AtCost],
    pictures: Mapping[str, bytes],
) -> str:  # fmt: skip
    seeds = ", ".join(map(str, about["seeds"]))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    said = [
        f"`guided-decode ablate {config.name}` · {about['prompts']} prompts · seeds {seeds} · "
        f"reward {about['reward']['kind']} · tokens {about['counting']} · {versions}",
        "",
        "Every response with its costs is in responses.jsonl, every figure in summary.json and "
        "settings.csv. Seconds are the clock's: clock.csv and the plot of seconds alone have them.",
    ]
    shown = [name for name in pictures if name.endswith(".png")]
    return tables.page(f"Ablation {config.stem}", said, figures, at_cost, shown)


def _pictures(figures: Sequence[Figures], seconds: Sequence[float], run: Run) -> dict[str, bytes]:
    counting, quality = run.ablation.counting, _quality(run)
    clock = {id(row): each for row, each in zip(figures, seconds, strict=True)}
    axes: dict[str, tuple[Callable[[Figures], float | None], str]] = {
        "kl": (lambda row: row.kl, "KL of a response from the policy, nats"),
        "tokens": (
            lambda row: row.total_tokens(counting),
            f"tokens of policy and scorer for an answer, {counting}",
        ),
        "seconds": (lambda row: clock[id(row)], "seconds for an answer"),
    }
    return {
        f"pareto_{name}.{ending}": content
        for name, (cost, title) in axes.items()
        for ending, content in draw(figures, cost, title, quality, bounds=name == "kl").items()
    }


def _clock(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "policy": each.setting.policy,
            "scorer": each.setting.scorer,
            "method": each.setting.method,
            "name": each.setting.name,
            "settings": each.setting.values,
            "answers": len(each.answers),
            "seconds": round(each.seconds, 4),
            "seconds_per_answer": round(each.seconds_per_answer, 6),
        }
        for each in outcomes
    ]


def _table(figures: Sequence[Figures], seconds: Sequence[float], counting: str) -> Table:
    result = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    result.add_column("method", overflow="fold")
    for header in ("quality", "95%", "− plain", "p", "KL", "tokens", "seconds"):
        result.add_column(header, justify="right", no_wrap=True)
    for policy in dict.fromkeys(row.setting.policy for row in figures):
        result.add_row(Text(policy, style="bold"))
        for row, clock in zip(figures, seconds, strict=True):
            if row.setting.policy == policy:
                result.add_row(*_cells(row, clock, counting))
    return result


def _cells(row: Figures, seconds: float, counting: str) -> list[str | Text]:
    over = row.over_plain
    gained, p = ("", "") if over is None else (
        f"{over.difference.mean:+.3f}",
        "<0.0001" if over.p_holm < 1e-4 else f"{over.p_holm:.4f}",
    )  # fmt: skip
    return [
        Text(f"  {row.setting.label}"),
        f"{row.quality.mean:.3f}",
        f"{row.quality.low:.3f}–{row.quality.high:.3f}",
        gained,
        p,
        tables.divergence(row),
        f"{row.total_tokens(counting):.0f}",
        f"{seconds:.3f}",
    ]
