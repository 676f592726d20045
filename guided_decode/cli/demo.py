"""`guided-decode demo`: plain and guided decoding of held-out prompts, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from guided_decode.cli.demo_families import FAMILIES, Section
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.picture import checked_picture
from guided_decode.cli.row_options import Seed
from guided_decode.cli.side_by_side import ValuedText, side_by_side
from guided_decode.cli.terminal import console
from guided_decode.cli.token_texts import token_texts
from guided_decode.cli.token_values import token_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guided_decode.lab.demo.decoding import Models
    from guided_decode.lab.demo.measure import Outcome

_TABLE_COLUMNS = 76
_SIZES = ", ".join(f"{one.prompts} of {name}" for name, one in FAMILIES.items())


def demo(
    family: Annotated[
        str, typer.Option(help="which built-in models", metavar="|".join(FAMILIES))
    ] = "tiny-tulu",
    prompts: Annotated[
        int | None, typer.Option(min=1, max=1000, help=f"held-out prompts \\[{_SIZES}]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="prompts of one batch")] = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="picture of quality against compute")] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="draw none")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the figures as one JSON array")] = False,
) -> None:
    """Compare decoding methods on a built-in model family; nothing is downloaded."""
    if family not in FAMILIES:
        raise Refusal(f"--family {family}: expected one of {', '.join(FAMILIES)}")
    if plot is not None:
        if no_plot:
            raise Refusal(f"--plot {plot} and --no-plot were both given: pass one of them")
        plot = checked_picture(plot)
    import torch

    own = FAMILIES[family]
    if own.threads is not None:
        torch.set_num_threads(own.threads)
    sections = own.load()
    outcomes = _measure(sections, prompts or own.prompts, batch_size or own.batch_size, seed)
    if as_json:
        from guided_decode.lab.demo.report import as_dict

        print(json.dumps([as_dict(outcome) for outcome in outcomes], indent=2))
    else:
        _print(own.title, sections, outcomes)
    if not no_plot:
        _draw(outcomes, plot, own.plot)


def _measure(
    sections: dict[str, Section], prompts: int, batch_size: int, seed: int
) -> list[Outcome]:
    from guided_decode.lab.demo.measure import compare, steps

    columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    outcomes: list[Outcome] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = sum(steps(prompts, batch_size, own.plan) for own in sections.values())
        bar = progress.add_task("", total=total)

        def begin(name: str) -> None:
            progress.update(bar, description=name)

        def advance() -> None:
            progress.advance(bar)

        for name, own in sections.items():
            messages = own.models.task.prompts(prompts)
            outcomes += compare(name, own.models, messages, batch_size=batch_size, seed=seed,
                                plan=own.plan, begin=begin, advance=advance)  # fmt: skip
    return outcomes


def _print(title: str, sections: dict[str, Section], outcomes: Sequence[Outcome]) -> None:
    from guided_decode.lab.demo.report import conclusions, notes, table

    out = console(at_least=_TABLE_COLUMNS)
    name, _, what = title.format(len(outcomes[0].messages)).partition(":")
    out.print(f"\n[bold]{name}[/]:{what}\n")
    out.print(table(outcomes))
    out.print()
    for note in notes(outcomes):
        out.print(note, style="dim")
    out.print()
    for sentence in conclusions(outcomes):
        out.print(sentence, highlight=False)
    out.print()
    _print_example(out, sections, outcomes)


def _print_example(out: Console, sections: dict[str, Section], outcomes: Sequence[Outcome]) -> None:
    """One prompt greedily, plain and guided: the first that they answer differently."""
    name = outcomes[0].policy
    plain, guided = (
        next(o for o in outcomes if o.policy == name and o.method.name == method)
        for method in ("plain, greedy", "guided, greedy")
    )
    pairs = zip(plain.texts, guided.texts, strict=True)
    differing = [i for i, (one, other) in enumerate(pairs) if one != other]
    at = differing[0] if differing else 0
    what = "the first prompt that they answer differently" if differing else "the first prompt"
    out.print(f"{plain.title}, greedy, {what}: [bold]{plain.messages[at]}[/]\n")
    columns = [
        (title, _valued(sections[name].models, outcome, at))
        for title, outcome in (("plain", plain), ("guided", guided))
    ]
    out.print(*side_by_side(columns), sep="\n\n")


def _valued(models: Models, outcome: Outcome, at: int) -> ValuedText:
    from guided_decode.lab.demo.decoding import prompt_ids

    response = outcome.responses[at]
    prompt = prompt_ids(models, [outcome.messages[at]])[0]
    ends = [models.tokenizer.eos_token_id]
    values = token_values(models.critic, prompt, response, ends)
    return ValuedText(token_texts(models.tokenizer, response), values)


def _draw(outcomes: Sequence[Outcome], asked: Path | None, usual: Path) -> None:
    """Draws to the place asked for, or to the usual one if matplotlib is there."""
    from guided_decode.lab.demo.plot import draw

    err = Console(stderr=True)
    path = asked or usual
    try:
        draw(outcomes, path)
    except ImportError as error:
        err.print(f"\nno plot: {one_line(error)}", style="dim", markup=False)
    else:
        err.print(f"\nquality against compute: {path}", style="dim", markup=False)
