"""`guided-decode demo`: plain and guided decoding of tiny-tulu's held-out prompts, compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from guided_decode.cli.checkpoints import load_policy, open_scorer
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.picture import checked_picture
from guided_decode.cli.row_options import Seed
from guided_decode.cli.side_by_side import ValuedText, side_by_side
from guided_decode.cli.terminal import console
from guided_decode.cli.token_texts import token_texts
from guided_decode.cli.token_values import token_values

if TYPE_CHECKING:
    from guided_decode.lab.demo.decoding import Models
    from guided_decode.lab.demo.measure import Outcome

POLICIES = {"SFT": "tiny-tulu-sft", "PPO": "tiny-tulu-ppo"}
SCORER = "tiny-tulu-value"
PLOT = Path("guided-decode-demo.png")
_TABLE_COLUMNS = 76


def demo(
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="held-out prompts")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts of one batch")] = 50,
    seed: Seed = 0,
    plot: Annotated[
        Path | None, typer.Option(help=f"picture of quality against compute [{PLOT}]")
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="draw none")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the figures as one JSON array")] = False,
) -> None:
    """Compare decoding methods on a small built-in model family; nothing is downloaded."""
    if plot is not None:
        if no_plot:
            raise Refusal(f"--plot {plot} and --no-plot were both given: pass one of them")
        plot = checked_picture(plot)
    import torch

    from guided_decode.tiny_tulu import held_out_prompts

    # The models are so small that a second thread waits more than it works.
    torch.set_num_threads(1)
    models = _load()
    messages = held_out_prompts(prompts)
    outcomes = _measure(models, messages, batch_size, seed)
    if as_json:
        from guided_decode.lab.demo.report import as_dict

        print(json.dumps([as_dict(outcome) for outcome in outcomes], indent=2))
    else:
        _print(models, outcomes)
    if not no_plot:
        _draw(outcomes, plot)


def _load() -> dict[str, Models]:
    from guided_decode.integrations.transformers import GuidedDecoding
    from guided_decode.lab.demo.decoding import Models
    from guided_decode.scoring.critic import CriticScorer

    policies = {name: load_policy(path, "cpu", "float32") for name, path in POLICIES.items()}
    critic = open_scorer(SCORER, ScorerOptions(), device="cpu", dtype="float32",
                         policy=next(iter(policies.values())))  # fmt: skip
    assert isinstance(critic, CriticScorer)
    return {
        name: Models(own.model, own.tokenizer, critic, GuidedDecoding)
        for name, own in policies.items()
    }


def _measure(
    models: dict[str, Models], messages: Sequence[str], batch_size: int, seed: int
) -> list[Outcome]:
    from guided_decode.lab.demo.measure import compare, steps

    columns = (BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    outcomes: list[Outcome] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = len(models) * steps(len(messages), batch_size)
        bar = progress.add_task("", total=total)

        def begin(name: str) -> None:
            progress.update(bar, description=name)

        def advance() -> None:
            progress.advance(bar)

        for name, family in models.items():
            outcomes += compare(name, family, messages, batch_size=batch_size, seed=seed,
                                begin=begin, advance=advance)  # fmt: skip
    return outcomes


def _print(models: dict[str, Models], outcomes: Sequence[Outcome]) -> None:
    from guided_decode.lab.demo.report import NOTES, conclusions, table

    out = console(at_least=_TABLE_COLUMNS)
    answers = len(outcomes[0].messages)
    out.print(
        f"\n[bold]tiny-tulu[/]: {answers} held-out sums, guided by the value model of its PPO run\n"
    )
    out.print(table(outcomes))
    out.print()
    for note in NOTES:
        out.print(note, style="dim")
    out.print()
    for sentence in conclusions(outcomes):
        out.print(sentence, highlight=False)
    out.print()
    _print_example(out, models, outcomes)


def _print_example(out: Console, models: dict[str, Models], outcomes: Sequence[Outcome]) -> None:
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
    out.print(f"{name} policy, greedy, {what}: [bold]{plain.messages[at]}[/]\n")
    columns = [
        (title, _valued(models[name], outcome, at))
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


def _draw(outcomes: Sequence[Outcome], asked: Path | None) -> None:
    """Draws to the place asked for, or to the usual one if matplotlib is there."""
    from guided_decode.lab.demo.plot import draw

    err = Console(stderr=True)
    path = asked or PLOT
    try:
        draw(outcomes, path)
    except ImportError as error:
        err.print(f"\nno plot: {one_line(error)}", style="dim", markup=False)
    else:
        err.print(f"\nquality against compute: {path}", style="dim", markup=False)
