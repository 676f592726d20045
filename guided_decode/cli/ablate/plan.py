"""What an ablation would run, and what it costs at most: `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from guided_decode.cli.ablate.cell import Cell
from guided_decode.cli.ablate.run import cell_cost
from guided_decode.cli.ablate.schema import Ablation
from guided_decode.cli.terminal import console
from guided_decode.lab.ablate.grid import blocks

_COLUMNS = 100


def print_plan(
    ablation: Ablation, cells: Sequence[Cell], prompts: int, prompt_tokens: float,
    done: int | None,
) -> None:  # fmt: skip
    """The grid, with the most tokens that each setting's answers take.

    done: units that the folder has; None: nobody has looked.
    """
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    table.add_column("method", overflow="fold")
    for header in ("answers", "policy tokens", "scorer tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    totals = [0.0, 0.0]
    for policy in dict.fromkeys(cell.policy.label for cell in cells):
        table.add_row(Text(policy, style="bold"))
        for cell in (each for each in cells if each.policy.label == policy):
            answers = prompts * _seeds(ablation, cell)
            cost = [each * answers for each in cell_cost(cell, prompt_tokens)]
            totals = [total + own for total, own in zip(totals, cost, strict=True)]
            label = Text(f"  {cell.setting.label}")
            table.add_row(label, f"{answers:,}", *(f"{each:,.0f}" for each in cost))
    table.add_row()
    every = sum(prompts * _seeds(ablation, cell) for cell in cells)
    table.add_row(Text("all, at most", style="bold"), f"{every:,}", *(f"{t:,.0f}" for t in totals))
    out = console(at_least=_COLUMNS)
    out.print(table)
    units = sum(_seeds(ablation, cell) for cell in cells) * len([*blocks(prompts, ablation.block)])
    known = "" if done is None else f", {done} of them done already"
    out.print(f"\n{len(cells)} settings, {prompts} prompts, {units} units of at most "
              f"{ablation.block} prompts{known}; nothing was run", highlight=False)  # fmt: skip


def _seeds(ablation: Ablation, cell: Cell) -> int:
    return len(ablation.seeds) if cell.setting.draws else 1
