"""What commands print, as the documentation shows it, compared with what they would print."""

import io
import json
import re
from collections.abc import Callable

from rich.console import Console
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.demo_families import POLICIES
from guided_decode.lab.demo import chosen
from guided_decode.lab.demo.methods import SUMS, Plan, smol_plan
from guided_decode.lab.demo.report import table
from guided_decode.tiny_tulu import lists

Figures = dict[str, dict[str, list[str]]]


def demo_figures(text: str) -> tuple[str, Figures]:
    """(the header's words, figures by section and method) of a demo's table."""
    header, figures, section = [], {}, ""
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        # A name alone: all other lines have figures.
        if re.fullmatch(r"\w+( policy)?", line.rstrip()):
            section = line.rstrip().removesuffix(" policy")
            figures[section] = {}
        elif not section:
            header.append(line)
        elif line.startswith("  ") and len(cells) > 1:
            figures[section][cells[0]] = cells[1:]
    return " ".join(" ".join(header).replace("─", "").split()), figures


def _table_of(text: str, measure: str, plans: dict[str, Plan]) -> tuple[object, object]:
    """Header, sections and methods; the figures are those of a slow test."""
    empty = table([], measure)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(empty)
    header, _ = demo_figures(console.export_text())
    rows = [
        (section, method.name, len(empty.columns) - 1)
        for section, plan in plans.items()
        for method in plan.methods
        if method.shown
    ]
    shown_header, figures = demo_figures(text)
    shown = [
        (section, name, len(row)) for section, of in figures.items() for name, row in of.items()
    ]
    return (shown_header, shown), (header, rows)


def _demo_table(text: str) -> tuple[object, object]:
    return _table_of(text, "accuracy", dict.fromkeys(POLICIES, SUMS))


def _smol_table(text: str) -> tuple[object, object]:
    plans = {name: smol_plan(settings) for name, settings in chosen.SMOL.items()}
    return _table_of(text, "reward", plans)


def _worked_answer(text: str) -> tuple[object, object]:
    return text, tiny_tulu.worked_answer(4837, 2956) + "\n"


def _best_of_the_lists(text: str) -> tuple[object, object]:
    return text, lists.best_answer("Sort and count 7391.") + "\n"


def _plan_of_the_70b_critic(text: str) -> tuple[object, object]:
    """The table and the words below it, as a narrow terminal has them."""
    policy = "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm"
    words = ["plan", policy, f"{policy}-value", "--gpu", "H100"]
    printed = CliRunner().invoke(app, words, env={"COLUMNS": "20"}).stdout
    table = printed[printed.index("the scorer") : printed.index("\n  guided-decode")]
    return _lines(text), _lines(table)


def _line_of_a_search(text: str) -> tuple[object, object]:
    """All but how long it took and what names the run; figures as the text rounds them."""
    words = ["search", "--method", "best-of-n", "--n", "2", "--seed", "3",
             "--prompt", "What is 4785 + 5426?"]  # fmt: skip
    shown, printed = (
        json.loads(one, parse_float=lambda figure: round(float(figure), 3))
        for one in (text, CliRunner().invoke(app, words).stdout)
    )
    for line in (shown, printed):
        assert line["cost"].pop("seconds") > 0
        line["run"] = len(line["run"])
    return shown, printed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


# (what a block shows, what it would have to show), by the block's name for it.
OUTPUTS: dict[str, Callable[[str], tuple[object, object]]] = {
    "the demo's table": _demo_table,
    "the table of smol's demo": _smol_table,
    "the answer to 4837 + 2956": _worked_answer,
    "the best answer to Sort and count 7391.": _best_of_the_lists,
    "the line of a search": _line_of_a_search,
    "the plan of the 70B critic": _plan_of_the_70b_critic,
}
